"""Recipe to ResolvedRecipe: every choice that a recipe may leave to `auto`, made once for a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardstep.configs.schema import (
    Convolutions,
    DataConfig,
    DataMode,
    Device,
    MemoryFormat,
    Precision,
    Recipe,
    TrainConfig,
)


@dataclass(frozen=True)
class ResolvedDataConfig(DataConfig):
    """The data section without `auto`."""

    mode: DataMode = "resident"


@dataclass(frozen=True)
class ResolvedTrainConfig(TrainConfig):
    """The train section without `auto`."""

    precision: Precision = "fp32"
    memory_format: MemoryFormat = "contiguous"
    convolutions: Convolutions = "direct"
    device: Device = "cpu"


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """A recipe whose choices are made; what config.yaml holds."""

    data: ResolvedDataConfig = field(default_factory=ResolvedDataConfig)
    train: ResolvedTrainConfig = field(default_factory=ResolvedTrainConfig)


@dataclass(frozen=True)
class Choices:
    """The keys that a recipe may leave to `auto`, as rank 0 has chosen them for all ranks."""

    mode: DataMode
    device: Device
    precision: Precision
    memory_format: MemoryFormat
    convolutions: Convolutions


CHOICES = (
    ("data", "mode"),
    ("train", "device"),
    ("train", "precision"),
    ("train", "memory_format"),
    ("train", "convolutions"),
)
"""Section and key of what a recipe may leave to `auto`."""


def resolve(recipe: Recipe, choices: Choices) -> ResolvedRecipe:
    """Put the choices of a run into its recipe, which stays as it is."""
    train_keys = {key: getattr(choices, key) for section, key in CHOICES if section == "train"}
    data = ResolvedDataConfig(**_shallow(recipe.data) | {"mode": choices.mode})
    train = ResolvedTrainConfig(**_shallow(recipe.train) | train_keys)
    return ResolvedRecipe(**_shallow(recipe) | {"data": data, "train": train})


def as_resolved(recipe: Recipe) -> ResolvedRecipe:
    """The recipe of a run that has begun; keys that an earlier version did not write get ResolvedRecipe's defaults."""
    read, default = (
        {key: getattr(getattr(one, section), key) for section, key in CHOICES} for one in (recipe, ResolvedRecipe())
    )
    return resolve(recipe, Choices(**{key: default[key] if value == "auto" else value for key, value in read.items()}))


def with_keys(recipe: Recipe, **sections: Mapping[str, object]) -> Recipe:
    """A copy of a recipe with other values of some keys: `with_keys(recipe, run={"resume": "never"})`."""
    changed: dict[str, Any] = {
        name: dataclasses.replace(getattr(recipe, name), **keys) for name, keys in sections.items()
    }
    return dataclasses.replace(recipe, **changed)


def _shallow(config: Any) -> dict[str, Any]:
    return {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
