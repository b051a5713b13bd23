"""data.fold and data.validation: which part of the training set is held out."""

import re
from dataclasses import dataclass

from shardstep.configs.schema import DataConfig

NO_TEST_SET = "none"
"""The value of data.test for a run without a test set."""


@dataclass(frozen=True)
class Fold:
    """One of several equal parts of a training set, which is held out; `number` counts from 1."""

    number: int
    folds: int

    def __str__(self) -> str:
        return f"{self.number}/{self.folds}"


def parse_fold(text: str) -> Fold | None:
    """Parse a fold such as "2/5"; return None if it is not one."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    fold = Fold(int(match[1]), int(match[2])) if match else None
    return fold if fold and 1 <= fold.number <= fold.folds and fold.folds > 1 else None


def held_out_share(config: DataConfig) -> float | Fold | None:
    """Return the share or fold of the training set to hold out; None if there is none, or validation has its own folder."""
    if config.fold is not None:
        return parse_fold(config.fold)
    return config.validation if isinstance(config.validation, float) else None


def held_out_problems(config: DataConfig) -> list[str]:
    """Check data.validation and data.fold."""
    problems, validation = [], config.validation
    is_share = isinstance(validation, float) and 0 < validation < 1
    if validation is not None and not isinstance(validation, str) and not is_share:
        problems.append(
            f"data.validation={validation} must be a share between 0 and 1, such as 0.1, or a folder of shards"
        )
    if config.fold is not None and parse_fold(config.fold) is None:
        problems.append(f"data.fold={config.fold} must be one of several parts, such as 2/5: the second of five")
    if config.fold is not None and validation is not None:
        problems.append(
            f"data.fold={config.fold} and data.validation={validation} both hold samples out: give one of them"
        )
    if config.test == NO_TEST_SET and config.fold is None and validation is None:
        problems.append("data.test=none leaves nothing to evaluate on: hold some out, such as data.validation=0.1")
    return problems
