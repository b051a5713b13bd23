"""Plan: the steps, epochs and batches of a run, from the recipe, the number of samples and the number of ranks."""

import math
from dataclasses import dataclass

from shardstep.configs.durations import Duration, Progress
from shardstep.configs.errors import InputError
from shardstep.configs.schema import TrainConfig
from shardstep.configs.text import count
from shardstep.datasets.batches import micro_pieces


@dataclass(frozen=True)
class Plan:
    """How a training set is divided into steps.

    Attributes:
        global_batch_size: samples per step over all ranks.
        samples_per_epoch: samples that an epoch consumes: all, or fewer if the last batch is dropped.
        micro_steps: backward passes per rank and full step.
        max_train_s: seconds of training after which the run ends even if its duration is not over; None without a limit.
    """

    global_batch_size: int
    samples_per_epoch: int
    world_size: int
    micro_steps: int
    duration: Duration
    max_train_s: float | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples_per_epoch / self.global_batch_size)

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; None if max_train_s may end it earlier."""
        return None if self.max_train_s is not None else self.duration_steps

    @property
    def duration_steps(self) -> int:
        """Steps of the duration, if no resume changes the batch size."""
        if self.duration.unit == "steps":
            return int(self.duration.value)
        epochs, rest = divmod(self.duration.value, 1)
        return int(epochs) * self.steps_per_epoch + math.ceil(rest * self.samples_per_epoch / self.global_batch_size)

    def advance(self, before: Progress, size: int) -> Progress:
        """Return the progress after a step of `size` samples."""
        position = before.position + size
        at_end = position >= self.samples_per_epoch
        return Progress(before.step + 1, before.epoch + at_end, 0 if at_end else position, before.samples + size)

    def epochs(self, progress: Progress) -> float:
        """Return the number of epochs done, with a fraction."""
        return progress.epoch + progress.position / self.samples_per_epoch

    def share_done(self, progress: Progress, train_s: float) -> float:
        """Return how much of the run is done, 0 to 1: of its duration or of max_train_s, whichever is more."""
        share = self.duration_done(progress)
        return share if self.max_train_s is None else max(share, min(1.0, train_s / self.max_train_s))

    def duration_done(self, progress: Progress) -> float:
        """Return how much of the duration is done, 0 to 1. It depends on no clock, because training depends on it."""
        done = self.epochs(progress) if self.duration.unit == "epochs" else progress.step
        return min(1.0, done / float(self.duration.value)) if self.duration.value else 1.0

    def samples_in(self, duration: Duration) -> float:
        """Return the number of samples in a duration; if it counts steps, as if all batches were full."""
        return float(duration.value) * (self.samples_per_epoch if duration.unit == "epochs" else self.global_batch_size)

    def left_s(
        self, progress: Progress, train_s: float, samples_per_s: float, evaluate_every: Duration, evaluation_s: float
    ) -> float:
        """Estimate the seconds that the rest of the run takes, including evaluations, of which one is always at the end."""
        samples = (1 - self.duration_done(progress)) * self.samples_in(self.duration)
        if self.max_train_s is not None:
            samples = min(samples, max(0.0, self.max_train_s - train_s) * samples_per_s)
        return samples / samples_per_s + math.ceil(samples / self.samples_in(evaluate_every)) * evaluation_s

    def is_over(self, progress: Progress) -> bool:
        """Return whether the duration is over."""
        return self.duration.is_over(progress, self.samples_per_epoch)

    def is_out_of_time(self, train_s: float) -> bool:
        """Return whether so many seconds of training reach max_train_s."""
        return self.max_train_s is not None and train_s >= self.max_train_s

    def is_due(self, every: Duration, before: Progress, after: Progress) -> bool:
        """Return whether work with the interval `every` is due after the step between two states."""
        return every.is_due(before, after, self.samples_per_epoch)


def make_plan(config: TrainConfig, num_samples: int, drop_last: bool, world_size: int) -> Plan:
    """Work out the batches of a run; `drop_last` drops an epoch's last global batch if it is not full.

    Raises:
        InputError: the batch is smaller than the number of ranks, or larger than the training set.
    """
    size = num_samples if config.global_batch_size == "full" else int(config.global_batch_size)
    if size < world_size:
        raise InputError(
            f"train.global_batch_size={size} is below the number of ranks, {world_size}: some ranks would never get a "
            f"sample. Raise it to {world_size} or more, or start at most {count(size, 'rank')}"
        )
    if size > num_samples:
        raise InputError(
            f"train.global_batch_size={size} is more than the {num_samples} training samples: give at most {num_samples}, or "
            f"full for full-batch gradient descent"
        )
    return Plan(
        global_batch_size=size,
        samples_per_epoch=num_samples - num_samples % size if drop_last else num_samples,
        world_size=world_size,
        micro_steps=len(micro_pieces(size, 0, world_size, config.max_micro_batch)),
        duration=Duration.parse(config.duration),
        max_train_s=config.max_wall_s,
    )
