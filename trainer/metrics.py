"""What the loop measures, to metrics.jsonl and those who read along. Sums stay on the device between log steps."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.configs.durations import Progress
from shardstep.configs.errors import TrainingFailed
from shardstep.trainer.evaluate import Evaluation
from shardstep.trainer.runtime import reduce_sums

_REMEDY = "Try a lower optimizer.lr, a schedule.warmup, train.clip_norm=1.0, or train.precision=fp32"


class Metrics:
    """The record of a run. All ranks call it; rank 0 writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        listeners: list[Callable[[dict[str, Any]], None]],
        has_accuracy: bool = True,
    ):
        """
        Args:
            accelerator: the world.
            path: metrics.jsonl.
            listeners: called on rank 0 with every line.
            has_accuracy: whether predictions can be correct; a reconstruction cannot.
        """
        self._accelerator = accelerator
        self._has_accuracy = has_accuracy
        self._file: TextIO | None = path.open("a") if accelerator.is_main_process else None
        self._listeners = listeners
        self._since_evaluation = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        self._samples_since_evaluation = 0
        self._window_samples, self._window_s, self._window_wait_s = 0, 0.0, 0.0
        self._skipped_steps = 0
        self._mark = time.perf_counter()
        self.last_train: dict[str, Any] = {}
        self.last_epoch: dict[str, Any] = {}

    def add(self, sums: Tensor, size: int, wait_s: float, skipped: bool) -> None:
        """Count one step.

        Args:
            sums: this rank's loss and correct predictions.
            size: of the global batch.
            wait_s: seconds without data.
            skipped: whether fp16's scaler left out the update, because the gradient overflowed.
        """
        self._skipped_steps += skipped
        self._since_evaluation += sums
        self._samples_since_evaluation += size
        now = time.perf_counter()
        self._window_s += now - self._mark
        self._window_samples += size
        self._window_wait_s += wait_s
        self._mark = now

    def check_finite(self, progress: Progress) -> None:
        """Make sure that no step since the last evaluation has left the numbers, before a state is saved. All reduce.

        Raises:
            TrainingFailed: one has.
        """
        (total,) = reduce_sums(self._accelerator, [self._since_evaluation])
        if not math.isfinite(total[0].item()):
            raise TrainingFailed(f"the loss of a step up to step {progress.step} was NaN or infinite. {_REMEDY}")

    def restart_clock(self) -> None:
        """Leave out of the training rate what has happened since the last step."""
        self._mark = time.perf_counter()

    def write_train(self, progress: Progress, epoch: float, sums: Tensor, size: int, lr: float) -> None:
        """Write a train line about the step that was just added. All ranks reduce.

        Raises:
            TrainingFailed: the loss of the step is NaN or infinite.
        """
        (total,) = reduce_sums(self._accelerator, [sums])
        loss, accuracy = (total / size).tolist()  # waits for the device: only on log steps
        self._window_s += time.perf_counter() - self._mark
        self.restart_clock()
        line = {
            "kind": "train",
            "step": progress.step,
            "epoch": round(epoch, 6),
            "samples": progress.samples,
            "loss": loss,
            "accuracy": accuracy if self._has_accuracy else None,
            "lr": lr,
            "samples_per_s": round(self._window_samples / self._window_s, 1),
            "data_wait_share": round(self._window_wait_s / self._window_s, 4),
        }
        self._window_samples, self._window_s, self._window_wait_s = 0, 0.0, 0.0
        if self._skipped_steps:
            line["skipped_steps"] = self._skipped_steps  # by fp16's scaler, since this process started
        if not math.isfinite(loss):
            self._record(line)
            raise TrainingFailed(
                f"the loss is {loss} at step {progress.step} (epoch {epoch:.2f}, rate {lr:g}). {_REMEDY}"
            )
        self.last_train = line
        self._write(line)

    def write_evaluation(
        self, progress: Progress, epoch: float, evaluation: Evaluation, lr: float, wall_s: float
    ) -> None:
        """Write an evaluation line, with the means over the training samples since the last one. All ranks reduce.

        Raises:
            TrainingFailed: the test loss is NaN or infinite.
        """
        (total,) = reduce_sums(self._accelerator, [self._since_evaluation])
        train_loss, train_accuracy = (total / max(self._samples_since_evaluation, 1)).tolist()
        if self._samples_since_evaluation:
            self.last_epoch = {
                "epoch_loss": train_loss,
                "epoch_accuracy": train_accuracy if self._has_accuracy else None,
            }
        self._since_evaluation.zero_()
        self._samples_since_evaluation = 0
        line = {
            "kind": "eval",
            "step": progress.step,
            "epoch": round(epoch, 6),
            "samples": progress.samples,
            "loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            "top5": evaluation.top5,
            "lr": lr,
            "train_loss": self.last_epoch.get("epoch_loss"),
            "train_accuracy": self.last_epoch.get("epoch_accuracy"),
            "per_class_accuracy": evaluation.per_class_accuracy,
            "wall_s": round(wall_s, 3),
        }
        if not (math.isfinite(evaluation.loss) and math.isfinite(train_loss)):
            self._record(line)
            raise TrainingFailed(f"the test loss is {evaluation.loss} at step {progress.step} (rate {lr:g}). {_REMEDY}")
        self._write(line)

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._record(line)
        if self._accelerator.is_main_process:
            for listener in self._listeners:
                listener(line)

    def _record(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(_finite(line)) + "\n")
            self._file.flush()


class Stopwatch:
    """Seconds since it was made, on top of those from before."""

    def __init__(self, already_s: float = 0.0):
        self._start = time.perf_counter() - already_s

    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file after a step: what a run that ended between checkpoints will do again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in lines))
        partial.replace(path)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run may be cut
        return math.inf


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    # NaN and Infinity are not JSON: a reader in another language would stop at them
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
