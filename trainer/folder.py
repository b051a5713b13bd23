"""A run's folder: what is in it already, whether this run goes on from there, and what of the old recipe still counts."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.files import partial_of
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.trainer.check import check_recipe
from shardstep.trainer.checkpoint_files import RECIPE, STATE, list_checkpoints, newest_whole, problems_of
from shardstep.trainer.convolutions import CONVOLUTION_METHODS, excludes
from shardstep.trainer.lock import LOCK_NAME, hold

CONFIG_NAME = "config.yaml"
MANIFEST_NAME = "train_manifest.json"  # classes, mean and std of the training set: what an evaluation needs of it

SETTLED = (
    ("data", "mode"),
    ("train", "device"),
    ("train", "precision"),
    ("train", "memory_format"),
    ("train", "convolutions"),
)
"""What a recipe may leave to `auto`: section and key."""

_MATHEMATICS = {
    "run": ["seed"],
    "data": ["augment", "normalize", "resize", "lanes", "window_shards", "last_batch"],
    "train": [
        *("global_batch_size", "precision", "weights", "memory_format", "convolutions", "compile", "compress"),
        *("clip_norm", "clip_value", "duration", "max_wall_s", "on_nan"),
    ],
}
_ORDER = ("run.seed", "data.lanes", "data.window_shards")  # what decides where in an epoch a sample comes


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: a whole checkpoint, or None to begin; and what is wrong with newer ones."""

    path: Path | None = None
    passed_over: tuple[str, ...] = ()


def settle_from(recipe: Recipe) -> None:
    """Take from the run that this one continues, if it does, what the recipe leaves to `auto`: it is chosen once."""
    folder = Path(recipe.run.dir)
    if recipe.run.resume == "never" or not is_run(folder):
        return
    newest_first = reversed(list_checkpoints(folder / "checkpoints"))
    newest = next((path for path in newest_first if not problems_of(path, only=[RECIPE])), None)
    if newest is None:
        return
    saved = load_recipe(str(newest / RECIPE)).recipe
    left_open = recipe.train.convolutions == "auto"
    for section, key in SETTLED:
        if getattr(getattr(recipe, section), key) == "auto":
            setattr(getattr(recipe, section), key, getattr(getattr(saved, section), key))
    method = saved.train.convolutions
    if left_open and method in CONVOLUTION_METHODS and excludes(recipe.train, method):
        recipe.train.convolutions = "direct"  # it was chosen together with another device, say


def find_resume(recipe: Recipe) -> Resume:
    """The newest whole checkpoint to go on from. Changes nothing; reads every byte of it.

    Raises:
        InputError: run.resume=must and there is none; there are some, but all are damaged; the folder holds something that
            is no run, or a run with another recipe.
    """
    folder = Path(recipe.run.dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir={folder} is a file")
    if _is_taken(folder) and not is_run(folder):
        raise InputError(f"run.dir={folder} holds other files than a run's: choose another folder")
    if recipe.run.resume == "never":
        return Resume()
    path, passed_over = newest_whole(folder / "checkpoints")
    if path is None and passed_over:
        raise InputError.from_problems(
            f"no checkpoint of {folder} is whole; run.resume=never begins again, and keeps the old run beside the new one",
            passed_over,
        )
    if path is None:
        if recipe.run.resume == "must":
            raise InputError(f"run.resume=must, but there is no checkpoint in {folder / 'checkpoints'}")
        return Resume()
    _check_same_run(folder, path, recipe)
    return Resume(path, tuple(passed_over))


def _check_same_run(folder: Path, path: Path, recipe: Recipe) -> None:
    saved = check_recipe(load_recipe(str(path / RECIPE)))
    wrong = [key for key in recipe.run.allow_changes if not _is_compared(key, saved, recipe)]
    if wrong:
        raise InputError(f"run.allow_changes: not among the keys that have to stay the same: {', '.join(wrong)}")
    differences = _differences(saved, recipe)
    refused = {key: change for key, change in differences.items() if key not in recipe.run.allow_changes}
    if refused:
        raise InputError.from_problems(
            f"{folder} holds a run with another recipe. To go on with the new values give "
            f"'run.allow_changes=[{','.join([*recipe.run.allow_changes, *refused])}]'; otherwise give another run.dir, or "
            f"run.resume=never to begin again (the old run is then kept beside it)",
            [f"{key}: {was} -> {now}" for key, (was, now) in refused.items()],
        )
    position = json.loads((path / STATE).read_bytes())["progress"]["position"]
    moved = [key for key in _ORDER if key in differences]
    if moved and position:
        raise InputError(
            f"{', '.join(moved)} cannot change in the middle of an epoch (position {position}): samples would be seen "
            f"twice, or not at all"
        )


def _is_compared(key: str, saved: Recipe, given: Recipe) -> bool:
    if key == "data.test":  # by its content, when the checkpoint is loaded
        return True
    section, _, name = key.partition(".")
    if section in OPEN_SECTIONS:
        return name in getattr(saved, section) or name in getattr(given, section)
    return name in _MATHEMATICS.get(section, [])


def begin(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Make and lock the folder of a new run; an old run in its place is kept beside it. Returns where the old one is now.

    Raises:
        InputError: another process is about to begin there, or has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hold(folder, warn) and is_run(folder):  # what was there at the first look has been held since then
        raise InputError(
            f"another run has begun in {folder} while this one was starting: start it again to go on there"
        )
    aside = None
    if _is_taken(folder):
        aside = next(path for number in itertools.count(1) if not (path := Path(f"{folder}.old{number}")).exists())
        folder.rename(aside)
        folder.mkdir()
        hold(folder, warn)
    return aside


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run; empty if it has none."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / CONFIG_NAME).is_file()


def _is_taken(folder: Path) -> bool:
    """Whether there is more than what a run leaves that was killed before its recipe was written."""
    begun = {LOCK_NAME, partial_of(folder / CONFIG_NAME).name}
    return folder.is_dir() and any(path.name not in begun for path in folder.iterdir())


def _differences(saved: Recipe, given: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys that change the mathematics of a run and differ: what they were, and what they are."""
    pairs = {
        f"{section}.{key}": (getattr(getattr(saved, section), key), getattr(getattr(given, section), key))
        for section, keys in _MATHEMATICS.items()
        for key in keys
    }
    for section in OPEN_SECTIONS:
        before, after = getattr(saved, section), getattr(given, section)
        pairs |= {f"{section}.{key}": (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: (was, now) for key, (was, now) in pairs.items() if not _same(key, was, now)}


def _same(key: str, was: Any, now: Any) -> bool:
    if key == "train.duration":
        return Duration.parse(was) == Duration.parse(now)  # "1 epoch" is "1 epochs"
    return was == now
