"""The input of a comparison: variants from `--over` grids or files, budgets, and learning rates to search."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from shardstep.configs.components import neighbours
from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.launch.grid import file_name, names_of, points_of

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_ENDLESS = "1000000 epochs"
RATE_FACTOR = math.sqrt(10)
SEARCH_SEED = 10_000
"""Seed of the search's runs. No compared run has it: a result must not benefit from the luck that selected it."""
MOST_EXTENSIONS = 3
"""Learning rates that extend a search, one after the other, while its best is at an edge."""


def take_folds(over: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the `--over` options without that of data.fold, and its values, which repeat each variant.

    Raises:
        InputError: a fold is given twice.
    """
    rest = [text for text in over if not text.startswith("data.fold=")]
    folds = [point[0].partition("=")[2] for text in over if text not in rest for point in points_of([text])]
    if len(set(folds)) < len(folds):
        raise InputError(f"--over data.fold={','.join(folds)}: give each fold once")
    return rest, folds


def read_variants(over: Sequence[str], file: str | None) -> dict[str, list[str]]:
    """Return the overrides of each variant by name.

    Args:
        over: `KEY=A,B,...`; several make a grid.
        file: YAML that maps names to lists of overrides: a path, or the name of one in configs/compare/.

    Raises:
        InputError: neither or both are given, or the file is not of that form.
    """
    if bool(over) == bool(file):
        raise InputError("give --over KEY=A,B,... (several make a grid) or --variants FILE to say what to compare")
    if file is None:
        points = points_of(over)
        return dict(zip(names_of(points), points, strict=True))
    path = _find(file)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if problems := _problems(content):
        raise InputError.from_problems(f"{path} is not a file of variants (name: [section.key=value, ...])", problems)
    return content


@dataclass(frozen=True)
class Budget:
    """The budget of each run, as text and as overrides."""

    text: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str | None) -> "Budget":
        """Parse "3 epochs", "500 steps", "120 s", "2 min" or "1 h"; None means the recipe's duration.

        Raises:
            InputError: it is none of these.
        """
        if text is None:
            return cls("the recipe's duration", ())
        if match := _TIME.fullmatch(text.strip()):
            seconds = float(match[1]) * _SECONDS[match[2]]
            return cls(f"{seconds:g} s of training", (f"train.max_wall_s={seconds:g}", f"train.duration={_ENDLESS}"))
        try:
            duration = Duration.parse(text)
        except InputError:
            forms = 'write epochs, steps or a time: "3 epochs", "500 steps", "120 s", "2 min"'
            raise InputError(f"--budget {text!r}: {forms}") from None
        return cls(str(duration), (f"train.duration={duration}",))


def rate_grid(base: float, trials: int, factor: float = RATE_FACTOR) -> list[float]:
    """Return learning rates around `base`, each `factor` times the one before, to three digits; odd numbers centre on it."""
    return [_round(base * factor ** (place - (trials - 1) // 2)) for place in range(trials)]


def next_rate(losses: dict[float, float], base: float, factor: float = RATE_FACTOR) -> float | None:
    """Return the learning rate that extends a search whose best is at an edge; None if it is not, or if all runs failed."""
    rates, best = sorted(losses), best_rate(losses)
    if best is None or rates[0] < best < rates[-1]:
        return None
    place = round(math.log(best / base, factor))  # counted from `base`, so that rounding does not add up
    return _round(base * factor ** (place - 1 if best == rates[0] else place + 1))


def best_rate(losses: dict[float, float]) -> float | None:
    """Return the learning rate of the lowest loss; None if every loss is infinite."""
    best = min(losses, key=losses.__getitem__, default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("shardstep.configs"))) / "compare"
    ours = {path.stem: path for path in folder.glob("*.yaml")}
    if name in ours:
        return ours[name]
    raise InputError(f"--variants {name!r} is neither a file nor built in; {neighbours(name, ours)}")


def _problems(content: Any) -> list[str]:
    if not isinstance(content, dict) or not content:
        return [f"it holds {type(content).__name__ if content else 'nothing'}"]
    problems = []
    for name, overrides in content.items():
        if not isinstance(name, str) or file_name(name) != name:
            problems.append(f"{name!r} must be a valid folder name: letters, digits, - and _")
        if not isinstance(overrides, list) or not all(isinstance(text, str) and "=" in text for text in overrides):
            problems.append(f"{name}: {overrides!r} is not a list of section.key=value")
    return problems
