"""data.sampling, data.mix and data.repeats: how often samples come, as a recipe says it."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardstep.configs.components import neighbours
from shardstep.configs.schema import DataConfig
from shardstep.configs.text import listed

_FORMS = (
    "uniform, balanced, {weights: {cat: 2, dog: 1}} with the shares of classes, or {weights: FILE} with a weight for each "
    "sample"
)


@dataclass(frozen=True)
class ClassWeights:
    """Shares of an epoch by class name, relative to each other; classes without one have 1, so that {} is balanced."""

    weights: dict[str, float]


@dataclass(frozen=True)
class WeightTable:
    """A file with a weight for each sample: a table with the columns `key` and `column`, or an .npy file."""

    path: str
    column: str = "weight"


@dataclass(frozen=True)
class MixedSet:
    """One of the data sets of data.mix, and its share of the samples, relative to the others'."""

    dir: str
    weight: float


def sampling_of(config: DataConfig) -> ClassWeights | WeightTable | None:
    """Return what a checked data.sampling says; None if each sample comes equally often."""
    if config.sampling == "uniform":
        return None
    if config.sampling == "balanced":
        return ClassWeights({})
    weights = config.sampling["weights"]
    if isinstance(weights, str):
        return WeightTable(weights, config.sampling.get("column", WeightTable.column))
    return ClassWeights({str(name): float(weight) for name, weight in weights.items()})


def mix_of(config: DataConfig) -> list[MixedSet]:
    """Return the sets of a checked data.mix; none if the training set is data.train."""
    return [MixedSet(**entry) for entry in config.mix]


def mix_name(config: DataConfig) -> str:
    """Return what a message calls the training set: data.train, or the folders of data.mix."""
    return " + ".join(entry.dir for entry in mix_of(config)) or config.train


def selection_without_paths(config: DataConfig) -> dict[str, Any]:
    """Return the three keys without their paths, as a resumed run compares them: what is in the files has a fingerprint."""
    table = isinstance(sampling_of(config), WeightTable)
    return {
        "sampling": {**config.sampling, "weights": "FILE"} if table else config.sampling,
        "mix": [entry.weight for entry in mix_of(config)],
        "repeats": config.repeats,
    }


def selection_problems(config: DataConfig) -> list[str]:
    """Check data.sampling and data.mix."""
    problems = _sampling_problems(config.sampling) + _mix_problems(config.mix)
    if not problems and config.mix and isinstance(sampling_of(config), WeightTable):
        problems.append(
            "data.sampling={weights: FILE} and data.mix exclude each other: samples of several sets may have one key; "
            "weight the sets in data.mix, or classes in data.sampling"
        )
    return problems


def _sampling_problems(sampling: Any) -> list[str]:
    if sampling in ("uniform", "balanced"):
        return []
    if not isinstance(sampling, Mapping) or "weights" not in sampling:
        return [f"data.sampling={sampling} must be {_FORMS}"]
    weights, column = sampling["weights"], sampling.get("column")
    problems = [
        f"data.sampling.{key} is not a key; {neighbours(str(key), ['weights', 'column'])}"
        for key in sampling
        if key not in ("weights", "column")
    ]
    if isinstance(weights, Mapping):
        problems += [
            f"data.sampling: the weight of {name} must be a number from 0, not {weight!r}"
            for name, weight in weights.items()
            if not _is_number(weight) or weight < 0
        ]
        twice = [name for name, times in Counter(map(str, weights)).items() if times > 1]
        if twice:
            problems.append(f"data.sampling gives {listed(twice)} two weights")
        if column is not None:
            problems.append(f"data.sampling.column={column} has no effect on the weights of classes: leave it out")
        if not weights:
            problems.append("data.sampling.weights is empty; data.sampling=balanced needs no weights")
        return problems
    if not isinstance(weights, str) or not weights:
        return [*problems, f"data.sampling={dict(sampling)} must be {_FORMS}"]
    if column is not None and not isinstance(column, str):
        problems.append(f"data.sampling.column={column} must be the name of a column of {weights}")
    return problems


def _mix_problems(mix: list[Any]) -> list[str]:
    problems, folders = [], []
    for place, entry in enumerate(mix):
        where = f"data.mix[{place}]"
        if not isinstance(entry, Mapping) or not {"dir", "weight"} <= set(entry):
            problems.append(
                f"{where}={entry!r} must be a folder and its weight, such as {{dir: data/photos, weight: 2}}"
            )
            continue
        problems += [
            f"{where}.{key} is not a key; {neighbours(str(key), ['dir', 'weight'])}"
            for key in entry
            if key not in ("dir", "weight")
        ]
        folder, weight = entry["dir"], entry["weight"]
        if not isinstance(folder, str) or not folder:
            problems.append(f"{where}.dir={folder!r} must be a folder of shards")
        elif "://" in folder:
            problems.append(f"{where}.dir={folder}: shards must be in a folder; URLs cannot be read yet")
        else:
            folders.append(os.path.realpath(os.path.expanduser(folder)))
        if not _is_number(weight) or weight <= 0:
            problems.append(f"{where}.weight={weight!r} must be a number above 0")
    twice = [folder for folder, times in Counter(folders).items() if times > 1]
    if twice:
        problems.append(f"data.mix names {listed(twice)} twice: add up the weights")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
