"""Recipe to ResolvedRecipe: the choices that a recipe leaves to `auto` (CHOICES) get their values, once for a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardstep.configs.schema import (
    Convolutions,
    CropVersion,
    DataConfig,
    DataMode,
    Device,
    MemoryFormat,
    OrderVersion,
    Precision,
    Recipe,
    TrainConfig,
)


@dataclass(frozen=True)
class ResolvedDataConfig(DataConfig):
    """The data section without `auto`."""

    mode: DataMode = "resident"
    order_version: OrderVersion = 1
    crop_version: CropVersion = 1


@dataclass(frozen=True)
class ResolvedTrainConfig(TrainConfig):
    """The train section without `auto`."""

    precision: Precision = "fp32"
    memory_format: MemoryFormat = "contiguous"
    convolutions: Convolutions = "direct"
    device: Device = "cpu"


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """A recipe whose CHOICES are made, as in a run's config.yaml."""

    data: ResolvedDataConfig = field(default_factory=ResolvedDataConfig)
    train: ResolvedTrainConfig = field(default_factory=ResolvedTrainConfig)


@dataclass(frozen=True)
class Choices:
    """Values that rank 0 chose for all ranks, for the keys that a recipe may leave at `auto`."""

    mode: DataMode
    device: Device
    precision: Precision
    memory_format: MemoryFormat
    convolutions: Convolutions
    order_version: OrderVersion
    crop_version: CropVersion


CHOICES = (
    ("data", "mode"),
    ("data", "order_version"),
    ("data", "crop_version"),
    ("train", "device"),
    ("train", "precision"),
    ("train", "memory_format"),
    ("train", "convolutions"),
)
"""Section and key of each value that a recipe may leave at `auto`."""


def resolve(recipe: Recipe, choices: Choices) -> ResolvedRecipe:
    """Return the recipe with the choices of a run filled in."""
    of_data, of_train = (
        {key: getattr(choices, key) for place, key in CHOICES if place == section} for section in ("data", "train")
    )
    data = ResolvedDataConfig(**_shallow(recipe.data) | of_data)
    train = ResolvedTrainConfig(**_shallow(recipe.train) | of_train)
    return ResolvedRecipe(**_shallow(recipe) | {"data": data, "train": train})


def choices_of(recipe: Recipe) -> dict[tuple[str, str], Any]:
    """Return the values of CHOICES in a recipe; some may be `auto`."""
    return {(section, key): getattr(getattr(recipe, section), key) for section, key in CHOICES}


def as_resolved(recipe: Recipe) -> ResolvedRecipe:
    """Return the recipe of a run that has begun; keys that an earlier version did not write get ResolvedRecipe's defaults."""
    default = choices_of(ResolvedRecipe())
    values = {place[1]: default[place] if value == "auto" else value for place, value in choices_of(recipe).items()}
    return resolve(recipe, Choices(**values))


def with_keys(recipe: Recipe, **sections: Mapping[str, object]) -> Recipe:
    """Return a copy of a recipe with some keys changed: `with_keys(recipe, run={"resume": "never"})`."""
    changed: dict[str, Any] = {
        name: dataclasses.replace(getattr(recipe, name), **keys) for name, keys in sections.items()
    }
    return dataclasses.replace(recipe, **changed)


def _shallow(config: Any) -> dict[str, Any]:
    return {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
