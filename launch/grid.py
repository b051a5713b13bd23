"""Grids of values: `--over KEY=A,B,...` options to the overrides of each combination, and a name for each."""

import itertools
import re
from collections.abc import Sequence

from shardstep.configs.errors import InputError


def points_of(over: Sequence[str]) -> list[list[str]]:
    """Return the grid of `KEY=A,B,...` options: a list of overrides for each combination.

    Raises:
        InputError: an option does not have that form.
    """
    axes = []
    for text in over:
        key, equals, values = text.partition("=")
        parts = _split(values)
        if not (equals and "." in key and all(parts)):
            raise InputError(f"--over {text!r} is not of the form section.key=value,value,...")
        axes.append([f"{key}={value}" for value in parts])
    return [list(point) for point in itertools.product(*axes)] if axes else []


def _split(values: str) -> list[str]:
    """Split at the commas outside brackets; [""] if brackets do not match."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if depth < 0:
            return [""]
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if depth == 0 else [""]


def names_of(points: Sequence[Sequence[str]]) -> list[str]:
    """Return a unique name for each point, made of its values and safe as a folder name."""
    names = ["-".join(file_name(setting.partition("=")[2]) for setting in point) for point in points]
    if len(set(names)) < len(names):  # values that differ only in characters that file_name removes
        names = [f"{number}-{name}" for number, name in enumerate(names)]
    return names


def file_name(text: str) -> str:
    """Return the text without characters that are special in file names or in Slurm's patterns for log names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.-")[:64] or "shardstep"
