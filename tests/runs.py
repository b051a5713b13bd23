"""Train a recipe inside a test, and read what it wrote."""

import json
from pathlib import Path
from typing import Any

from tests.distributed import run_ranks


def write_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    """A small recipe on a test's shards: an mlp with SGD unless `sections` say otherwise."""
    import yaml

    recipe: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": str(shards / "train"), "test": str(shards / "test")},
        "model": {"name": "mlp", "hidden": [16]},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "train": {
            "global_batch_size": 30,
            "duration": "2 epochs",
            "device": "cpu",
            "precision": "fp32",
            "memory_format": "contiguous",
        },
        "log": {"every": "1 steps"},
    }
    for section, content in sections.items():
        replaced = section in ("model", "optimizer", "loss", "schedule")
        recipe[section] = content if replaced else recipe.get(section, {}) | content
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_ranks(world_size: int, recipe: Path, *overrides: str) -> None:
    """Train on N gloo processes, as the command does."""
    run_ranks(world_size, _train, [str(recipe), *overrides])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_lines(folder: Path) -> list[dict[str, Any]]:
    """The train lines of a run's metrics.jsonl."""
    return [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def _train(arguments: list[str]) -> None:
    from shardstep.launch.train import main

    assert main(arguments) == 0
