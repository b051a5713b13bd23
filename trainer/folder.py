"""A run's folder: what is in it already, whether this run goes on from there, and what of the old recipe still counts."""

import itertools
import json
from pathlib import Path
from typing import Any

from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.trainer.check import check_recipe
from shardstep.trainer.checkpoint import list_checkpoints

CONFIG_NAME = "config.yaml"
MANIFEST_NAME = "train_manifest.json"  # classes, mean and std of the training set: what an evaluation needs of it

_SETTLED = (("data", "mode"), ("train", "precision"), ("train", "memory_format"), ("train", "device"))
_MATHEMATICS = {
    "run": ["seed"],
    "data": ["augment", "normalize", "resize", "lanes", "window_shards", "last_batch"],
    "train": ["global_batch_size", "precision", "memory_format", "clip_norm", "clip_value", "duration"],
}


def settle_from(recipe: Recipe) -> None:
    """Take from the run that this one continues, if it does, what the recipe leaves to `auto`: it is chosen once."""
    folder = Path(recipe.run.dir)
    if recipe.run.resume == "never" or not (folder / CONFIG_NAME).is_file() or not _checkpoints(folder):
        return
    saved = load_recipe(str(folder / CONFIG_NAME)).recipe
    for section, key in _SETTLED:
        if getattr(getattr(recipe, section), key) == "auto":
            setattr(getattr(recipe, section), key, getattr(getattr(saved, section), key))


def find_resume(recipe: Recipe) -> Path | None:
    """The checkpoint to go on from, or None to begin. Changes nothing.

    Raises:
        InputError: run.resume=must and there is none; the folder holds something that is no run, or a run with another
            recipe.
    """
    folder = Path(recipe.run.dir)
    found = _checkpoints(folder)
    if recipe.run.resume == "must" and not found:
        raise InputError(f"run.resume=must, but there is no checkpoint in {folder / 'checkpoints'}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir={folder} is a file")
    if _is_taken(folder) and not _is_run(folder):
        raise InputError(f"run.dir={folder} holds other files than a run's: choose another folder")
    if recipe.run.resume == "never" or not found:
        return None
    differences = _differences(check_recipe(load_recipe(str(folder / CONFIG_NAME))), recipe)
    if differences:
        raise InputError.from_problems(
            f"{folder} holds a run with another recipe, which this one cannot continue (give another run.dir, or "
            f"run.resume=never to begin again; the old run is then kept beside it)",
            differences,
        )
    return found[-1]


def begin(folder: Path) -> Path | None:
    """Make the folder of a new run; an old run in its place is kept beside it. Returns where the old one is now."""
    aside = None
    if _is_taken(folder):
        aside = next(path for number in itertools.count(1) if not (path := Path(f"{folder}.old{number}")).exists())
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    return aside


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run; empty if it has none."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _checkpoints(folder: Path) -> list[Path]:
    return list_checkpoints(folder / "checkpoints")


def _is_taken(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def _differences(saved: Recipe, given: Recipe) -> list[str]:
    """Keys that change the mathematics of a run and differ, as "key: was -> is"."""
    pairs = [
        (f"{section}.{key}", getattr(getattr(saved, section), key), getattr(getattr(given, section), key))
        for section, keys in _MATHEMATICS.items()
        for key in keys
    ]
    for section in OPEN_SECTIONS:
        before, after = getattr(saved, section), getattr(given, section)
        pairs += [(f"{section}.{key}", before.get(key), after.get(key)) for key in {**before, **after}]
    return [f"{key}: {was} -> {now}" for key, was, now in pairs if not _same(key, was, now)]


def _same(key: str, was: Any, now: Any) -> bool:
    if key == "train.duration":
        return Duration.parse(was) == Duration.parse(now)  # "1 epoch" is "1 epochs"
    return was == now
