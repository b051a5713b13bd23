"""Durations in epochs or steps: "10 epochs", "8.5 epochs", "200 steps"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from shardstep.configs.errors import InputError

Unit = Literal["epochs", "steps"]
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(epochs?|steps?)")


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    step: int = 0  # completed optimizer steps
    epoch: int = 0  # completed epochs; the number of the current one, from 0
    position: int = 0  # samples consumed in this epoch; the next global position
    samples: int = 0  # consumed since the start of the run


@dataclass(frozen=True)
class Duration:
    """A length of training. The value is a Fraction, so that "0.1 epochs" is exactly a tenth."""

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Parse "10 epochs", "8.5 epochs" or "200 steps".

        Raises:
            InputError: the text has no number or unit, the value is 0, or the number of steps is not an integer.
        """
        match = _PATTERN.fullmatch(text.strip())
        if not match:
            raise InputError(f'{text!r} is not a duration; write a number and a unit: "10 epochs" or "200 steps"')
        value, unit = Fraction(match[1]), match[2].rstrip("s") + "s"
        if value == 0:
            raise InputError(f"{text!r}: a duration must be longer than 0")
        if unit == "steps" and value.denominator != 1:
            raise InputError(f"{text!r}: the number of steps must be an integer")
        return cls(value, "epochs" if unit == "epochs" else "steps")

    def __str__(self) -> str:
        number = str(self.value) if self.value.denominator == 1 else str(float(self.value))
        return f"{number} {self.unit}"

    def elapsed(self, progress: Progress, samples_per_epoch: int) -> float:
        """Return the elapsed multiple of this duration: 1 at its end, 2 after twice as long."""
        done, length = self._counts(progress, samples_per_epoch)
        return done / length

    def is_over(self, progress: Progress, samples_per_epoch: int) -> bool:
        """Check whether the duration has passed: "8.5 epochs" ends at the first step boundary at or past 8.5 epochs."""
        done, length = self._counts(progress, samples_per_epoch)
        return done >= length

    def is_due(self, before: Progress, after: Progress, samples_per_epoch: int) -> bool:
        """Check whether the step from `before` to `after` reaches or passes a multiple of this duration."""
        # Integers: no drift, and no multiple is missed when one step spans several.
        done, length = self._counts(after, samples_per_epoch)
        return done // length > self._counts(before, samples_per_epoch)[0] // length

    def _counts(self, progress: Progress, samples_per_epoch: int) -> tuple[int, int]:
        """Return the elapsed time and the duration as integers of one unit: 20 times as fast as a division of Fractions,
        and needed at every step."""
        if self.unit == "steps":
            return progress.step, self.value.numerator
        done = progress.epoch * samples_per_epoch + progress.position
        return done * self.value.denominator, self.value.numerator * samples_per_epoch


def duration_problems(texts: Mapping[str, object]) -> list[str]:
    """Return the problems of the durations of some keys, each prefixed with its key."""
    problems = []
    for key, text in texts.items():
        try:
            Duration.parse(str(text))
        except InputError as error:
            problems.append(f"{key}: {error}")
    return problems
