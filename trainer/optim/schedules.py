"""Schedules: the factor on every base learning rate at each optimizer step, as a pure function of the run's progress.

They keep no state, so a resumed run, or one on another number of ranks, computes the same learning rates. Keyword arguments
are the recipe's options; durations are texts such as "30 epochs".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from shardstep.configs.durations import Duration, Progress, duration_problems
from shardstep.configs.imported import call, is_import_path, load_function


@dataclass(frozen=True)
class Clock:
    """The time of a step, the input of schedules.

    `fraction`: share of the run that is done, not counting the warm-up: 0 at its end, 1 at the end of the run.
    """

    progress: Progress  # before the step
    samples_per_epoch: int
    fraction: float

    def elapsed(self, duration: str) -> float:
        """Return how many of these durations have passed since the start of the run."""
        return float(Duration.parse(duration).elapsed(self.progress, self.samples_per_epoch))


def constant(clock: Clock) -> float:
    """Always 1."""
    return 1.0


def step(clock: Clock, *, every: str, gamma: float = 0.1) -> float:
    """Times gamma after each `every`: gamma ** floor(t / every)."""
    return gamma ** math.floor(clock.elapsed(every))


def multistep(clock: Clock, *, milestones: list[str], gamma: float = 0.1) -> float:
    """Times gamma at each of the milestones."""
    return gamma ** sum(clock.elapsed(milestone) >= 1 for milestone in milestones)


def exponential(clock: Clock, *, gamma: float, every: str = "1 epochs") -> float:
    """Times gamma per `every`, continuously: gamma ** (t / every)."""
    return gamma ** clock.elapsed(every)


def cosine(clock: Clock, *, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final` over the run. Loshchilov and Hutter 2016, arXiv 1608.03983, equation 5."""
    return final + (1 - final) * (1 + math.cos(math.pi * clock.fraction)) / 2


def linear(clock: Clock, *, final: float = 0.0) -> float:
    """A straight line from 1 to `final` over the run."""
    return 1 + (final - 1) * clock.fraction


def one_cycle(
    clock: Clock,
    *,
    rise: float = 0.3,
    start: float = 0.04,
    final: float = 4e-6,
    anneal: Literal["cosine", "linear"] = "cosine",
) -> float:
    """Up from `start` to 1 in the first part `rise` of the run, then down to `final`. Smith 2017, arXiv 1708.07120.

    The defaults are those of torch.optim.lr_scheduler.OneCycleLR (1 / 25, and a ten-thousandth of that at the end).
    """
    rising = clock.fraction < rise
    begin, end = (start, 1.0) if rising else (1.0, final)
    part = clock.fraction / rise if rising else (clock.fraction - rise) / (1 - rise)
    weight = part if anneal == "linear" else (1 - math.cos(math.pi * part)) / 2
    return begin + (end - begin) * weight


_FUNCTIONS = (constant, step, multistep, exponential, cosine, linear, one_cycle)
SCHEDULES: dict[str, Callable[..., float]] = {function.__name__: function for function in _FUNCTIONS}

ENDS_WITH_RUN = ("cosine", "linear", "one_cycle")
"""Schedules that need to know when the run will end."""

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {"warmup": (str | None, None), "warmup_start": (float, 0.0)}
"""Options of every schedule: type and default. warmup: duration of a linear rise from warmup_start times lr."""


class LearningRate:
    """The factor on the learning rates at each step of a run."""

    def __init__(self, section: dict[str, Any], duration: Duration, samples_per_epoch: int, global_batch_size: int):
        self._until = lambda end: LearningRate(section, Duration.parse(end), samples_per_epoch, global_batch_size)
        self._parts: dict[str, LearningRate] = {}
        self._function = schedule_of(section["name"])
        self._options = {key: section[key] for key in section if key not in ("name", *COMMON_OPTIONS)}
        self._duration = duration
        self._samples_per_epoch = samples_per_epoch
        self._warmup_start = section["warmup_start"]
        self._warmup = Duration.parse(section["warmup"]) if section["warmup"] else None
        self._warmup_share = 0.0  # of the run
        if self._warmup:
            steps_per_epoch = math.ceil(samples_per_epoch / global_batch_size)
            warmup, run = (
                float(length.value) * (steps_per_epoch if length.unit == "epochs" else 1)
                for length in (self._warmup, duration)
            )
            self._warmup_share = min(warmup / run, 1.0)

    def factor(self, progress: Progress, until: str | None = None) -> float:
        """Return the factor for the step that begins at `progress`; with `until`, as if the run ended then, and then 0."""
        if until is not None:
            if until not in self._parts:
                self._parts[until] = self._until(until)
            part = self._parts[until]
            return 0.0 if part._duration.is_over(progress, self._samples_per_epoch) else part.factor(progress)
        if self._warmup:
            risen = self._warmup.elapsed(progress, self._samples_per_epoch)
            if risen < 1:
                return self._warmup_start + (1 - self._warmup_start) * float(risen)
        passed = min(float(self._duration.elapsed(progress, self._samples_per_epoch)), 1.0)
        rest = 1 - self._warmup_share
        fraction = max(0.0, passed - self._warmup_share) / rest if rest else 1.0
        return self._function(Clock(progress, self._samples_per_epoch, fraction), **self._options)


def schedule_of(name: str) -> Callable[..., float]:
    """Return the function of a schedule's name."""
    return partial(call, f"schedule.name={name}", load_function(name)) if is_import_path(name) else SCHEDULES[name]


def check_schedule(section: dict[str, Any]) -> list[str]:
    """Return the problems of a schedule's values that their types do not show."""
    durations = ("warmup",) if is_import_path(section["name"]) else ("every", "warmup")
    texts = {f"schedule.{key}": section[key] for key in durations if section.get(key) is not None}
    if section["name"] == "multistep":
        texts |= {f"schedule.milestones[{place}]": text for place, text in enumerate(section["milestones"])}
    problems = duration_problems(texts)
    if section["name"] == "one_cycle" and not 0 < section["rise"] < 1:
        problems.append(f"schedule.rise={section['rise']} must be between 0 and 1")
    if not section["warmup"] and section["warmup_start"] != 0:
        problems.append("schedule.warmup_start has no effect without schedule.warmup")
    return problems
