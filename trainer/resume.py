"""Resume a run: find its newest intact checkpoint, keep its earlier choices of `auto`, load it, claim its folder."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.files import partial_of, write_atomically
from shardstep.configs.load import load_recipe, save_recipe
from shardstep.configs.recipe_code import as_kept
from shardstep.configs.resolve import ResolvedRecipe, as_resolved, choices_of, with_keys
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.configs.selection import selection_without_paths
from shardstep.datasets.batches import micro_pieces
from shardstep.datasets.manifest import Manifest, manifest_bytes
from shardstep.trainer.checkpoints import checkpoint, checkpoint_files
from shardstep.trainer.checkpoints.checkpoint_files import RECIPE, STATE, newest_intact, problems_of
from shardstep.trainer.checkpoints.lock import LOCK_NAME, hold
from shardstep.trainer.data import Data
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.collectives import broadcast_object, raise_on_all_ranks
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, excludes
from shardstep.trainer.metrics import cut_lines
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.optimizers import options_in_groups
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.own_code.kept_code import code_changes, keep_code
from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.state import TrainState
from shardstep.trainer.validate_recipe import validate_recipe

_MATHEMATICS = {
    "run": ["seed"],
    "data": [
        *("augment", "normalize", "resize", "crop_version"),
        *("lanes", "window_shards", "order_version", "last_batch"),
        *("validation", "fold", "split_seed"),
        *("sampling", "mix", "repeats"),
    ],
    "train": [
        *("global_batch_size", "precision", "weights", "memory_format", "convolutions", "compile", "compress"),
        *("clip_norm", "clip_value", "duration", "max_wall_s", "stop_when", "on_nan"),
    ],
    "eval": [
        "views",
        "sure_above",
        "threshold",
    ],  # the evaluations of one run are compared with each other: see state.best
}
_EVALUATED = {"eval": ["views", "sure_above", "threshold"], "data": ["validation", "fold", "split_seed"]}
_MICRO_BATCH = "train.max_micro_batch"  # mathematics only with batch norm, whose statistics are those of a micro-batch
_CODE = "code"  # files and packages that the recipe names by import path
# Seconds to wait for the last attempt's lock: a network file system keeps a crashed node's locks for a lease, often 90 s.
_RESTART_PATIENCE_S = 120.0
# These determine the order of samples in an epoch.
_ORDER = (
    *("run.seed", "data.lanes", "data.window_shards", "data.order_version"),
    *("data.sampling", "data.mix", "data.repeats"),
)


@dataclass(frozen=True)
class Resume:
    """The intact checkpoint to resume from, or None to start a new run; and what is wrong with newer checkpoints."""

    path: Path | None = None
    damaged: tuple[str, ...] = ()


def with_earlier_choices(recipe: Recipe) -> Recipe:
    """Replace each `auto` of a recipe by the choice of the run that it will resume, if there is one."""
    run_dir = RunDir(Path(recipe.run.dir))
    if recipe.run.resume == "never" or not run_dir.is_run:
        return recipe
    newest = next((path for path in reversed(run_dir.checkpoints) if not problems_of(path, only=[RECIPE])), None)
    if newest is None:
        return recipe
    saved = as_resolved(load_recipe(str(newest / RECIPE)).recipe)
    left = [place for place, value in choices_of(recipe).items() if value == "auto"]
    earlier = choices_of(saved)
    recipe = _with_choices(recipe, {place: earlier[place] for place in left})
    method = recipe.train.convolutions
    if ("train", "convolutions") in left and method in CONVOLUTION_METHODS and excludes(recipe.train, method):
        recipe = with_keys(recipe, train={"convolutions": "direct"})  # it was chosen for another device, say
    return recipe


def with_choices_of_rank_0(world: PartialState, recipe: Recipe) -> Recipe:
    """Return the recipe with rank 0's choices, because other hosts may not see the folder of the run. All ranks."""
    return _with_choices(recipe, broadcast_object(world, choices_of(recipe)))


def _with_choices(recipe: Recipe, values: dict[tuple[str, str], Any]) -> Recipe:
    for (section, key), value in values.items():
        recipe = with_keys(recipe, **{section: {key: value}})
    return recipe


def lock_and_find(run_dir: RunDir, recipe: Recipe, warn: Callable[[str], None]) -> Resume:
    """Lock a run's folder against other runs, and find where to resume. Rank 0.

    Raises:
        InputError: another process holds the folder; see also find_resume.
    """
    if run_dir.is_run:
        hold(run_dir.path, warn, _RESTART_PATIENCE_S if launch_env.is_restarted() else 0)
    return find_resume(recipe)


def find_resume(recipe: Recipe) -> Resume:
    """Find the newest intact checkpoint to resume from. Reads every byte of it, and changes nothing.

    Raises:
        InputError: run.resume=must, but there is no checkpoint; all checkpoints are damaged; the folder holds a run with
            another recipe, or files that are not a run's.
    """
    run_dir = RunDir(Path(recipe.run.dir))
    folder = run_dir.path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir={folder} is a file")
    if _is_taken(run_dir) and not run_dir.is_run:
        raise InputError(f"run.dir={folder} holds files that are not a run's: choose another folder")
    if recipe.run.resume == "never":
        return Resume()
    path, damaged = newest_intact(run_dir.checkpoints_path)
    if path is None and damaged:
        raise InputError.from_problems(
            f"all checkpoints of {folder} are damaged; run.resume=never starts over and keeps the old run beside the new one",
            damaged,
        )
    if path is None:
        if recipe.run.resume == "must":
            raise InputError(f"run.resume=must, but there is no checkpoint in {run_dir.checkpoints_path}")
        return Resume()
    _check_same_run(folder, path, recipe)
    return Resume(path, tuple(damaged))


def _check_same_run(folder: Path, path: Path, recipe: Recipe) -> None:
    # The names of its code stay as they are: it does not run.
    saved = as_resolved(validate_recipe(replace(load_recipe(str(path / RECIPE)), folders=())))
    wrong = [key for key in recipe.run.allow_changes if not _is_compared(key, saved, recipe)]
    if wrong:
        raise InputError(f"run.allow_changes: these keys may change anyway, or do not exist: {', '.join(wrong)}")
    differences = _differences(saved, recipe)
    if changes := code_changes(recipe, RunDir(folder).code_json_path):
        differences[_CODE] = changes
    refused = {key: change for key, change in differences.items() if key not in recipe.run.allow_changes}
    if refused:
        raise _another_recipe(
            folder, recipe, [f"{key}: {was} -> {now}" for key, (was, now) in refused.items()], [*refused]
        )
    position = json.loads((path / STATE).read_bytes())["progress"]["position"]
    moved = [key for key in _ORDER if key in differences]
    if moved and position:
        raise InputError(
            f"{', '.join(moved)} cannot change in the middle of an epoch (position {position}): samples would be repeated "
            f"or missed. Give the old value"
        )


def _another_recipe(folder: Path, recipe: Recipe, problems: list[str], refused: list[str]) -> InputError:
    return InputError.from_problems(
        f"{folder} holds a run with another recipe. To resume it with the new values, give "
        f"'run.allow_changes=[{','.join([*recipe.run.allow_changes, *refused])}]'; otherwise give another run.dir, or "
        f"run.resume=never to start over (and keep the old run beside the new one)",
        problems,
    )


def _check_micro_batches(saved: Recipe, recipe: Recipe, plan: Plan, module: nn.Module) -> None:
    """Check that a model with batch norm keeps the size of its micro-batches, as far as the number of ranks allows."""
    if _MICRO_BATCH in recipe.run.allow_changes or not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return
    was, now = saved.train.max_micro_batch, recipe.train.max_micro_batch
    sizes = [micro_pieces(plan.global_batch_size, 0, plan.world_size, most) for most in (was, now)]
    if sizes[0] != sizes[1]:
        problem = f"{_MICRO_BATCH}: {was} -> {now}; batch norm computes its statistics over a micro-batch"
        raise _another_recipe(Path(recipe.run.dir), recipe, [problem], [_MICRO_BATCH])


def _is_compared(key: str, saved: Recipe, given: Recipe) -> bool:
    if key in ("data.test", _MICRO_BATCH, _CODE):  # compared when the checkpoint is loaded, or with code.json
        return True
    section, _, name = key.partition(".")
    if section in OPEN_SECTIONS:
        return name in getattr(saved, section) or name in getattr(given, section)
    return name in _MATHEMATICS.get(section, [])


def restore(
    world: PartialState,
    state: TrainState,
    found: Resume,
    recipe: ResolvedRecipe,
    data: Data,
    plan: Plan,
    display: Display,
) -> None:
    """Load the checkpoint to resume from, if there is one, into a new state, and record this start in it. All ranks.

    Raises:
        InputError: the checkpoint does not fit the model, the optimizer, the data sets or the micro-batches.
    """
    state.fingerprint, state.test_fingerprint = data.fingerprint, data.held_out.manifest.fingerprint
    for problem in found.damaged:
        display.warn(f"skipped a damaged checkpoint: {problem}")
    if found.path:
        new_test_set: Literal["allow", "refuse"] = "allow" if "data.test" in recipe.run.allow_changes else "refuse"
        with raise_on_all_ranks(world):
            saved = load_recipe(str(found.path / RECIPE)).recipe
            _check_micro_batches(saved, recipe, plan, state.module)
            checkpoint.load(
                state, found.path, world.process_index, world.num_processes, new_test_set,
                options_in_groups(recipe.optimizer),
            )  # fmt: skip
            if _evaluates_otherwise(saved, recipe):
                state.best = None  # its score cannot be compared with new ones
        if state.progress.position >= plan.samples_per_epoch:  # a new batch size has made the epoch shorter
            state.progress = replace(state.progress, epoch=state.progress.epoch + 1, position=0)
        display.note(f"resuming from {found.path}")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    state.starts.append({"step": state.progress.step, "world_size": world.num_processes, "time": now})


def _evaluates_otherwise(saved: Recipe, given: Recipe) -> bool:
    """Return whether evaluations now have other views or other samples held out, as run.allow_changes may allow."""
    pairs = ((getattr(saved, section), getattr(given, section), keys) for section, keys in _EVALUATED.items())
    return any(getattr(before, key) != getattr(now, key) for before, now, keys in pairs for key in keys)


def claim(
    world: PartialState,
    run_dir: RunDir,
    run_is_new: bool,
    recipe: ResolvedRecipe,
    train: Manifest,
    state: TrainState,
    display: Display,
) -> None:
    """Write the first files of a new run, or remove what a resumed one will write again. All ranks; rank 0 writes.

    Raises:
        InputError: the folder cannot be written, or another process has started a run there.
    """
    with raise_on_all_ranks(world):
        if not world.is_main_process:
            return
        try:
            aside = _begin(run_dir, display.warn) if run_is_new else None
            if aside:
                display.note(f"moved the old run in {run_dir.path} to {aside}")
            save_recipe(as_kept(recipe), run_dir.config_path)
            if warning := keep_code(recipe, run_dir.code_path, run_dir.code_json_path):
                display.warn(warning)
            write_atomically(run_dir.train_manifest_path, manifest_bytes(train))
            checkpoint_files.sweep(run_dir.checkpoints_path)
            checkpoint_files.set_aside(run_dir.checkpoints_path, state.progress.step)
            for lines in run_dir.path.glob("*.jsonl"):
                cut_lines(lines, state.progress.step, state.evaluation_due)
        except OSError as error:
            raise InputError(f"run.dir={run_dir.path} cannot be used: {error.strerror or error}") from None


def _begin(run_dir: RunDir, warn: Callable[[str], None]) -> Path | None:
    """Create and lock the folder of a new run; move an old run out of the way, and return where it is now.

    Raises:
        InputError: another process has started a run there, or is about to.
    """
    folder = run_dir.path
    folder.mkdir(parents=True, exist_ok=True)
    if hold(folder, warn) and run_dir.is_run:  # a run that was there before is already locked by this process
        raise InputError(
            f"another run started in {folder} while this one was starting: start it again to resume that run"
        )
    aside = None
    if _is_taken(run_dir):
        aside = next(path for number in itertools.count(1) if not (path := Path(f"{folder}.old{number}")).exists())
        folder.rename(aside)
        folder.mkdir()
        hold(folder, warn)
    return aside


def _is_taken(run_dir: RunDir) -> bool:
    """Return whether a folder holds more than the files of a run that was killed before it wrote its recipe."""
    begun = {LOCK_NAME, partial_of(run_dir.config_path).name}
    return run_dir.path.is_dir() and any(path.name not in begun for path in run_dir.path.iterdir())


def _differences(saved: Recipe, given: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys that affect a run's mathematics and differ, with their old and new values."""
    given = as_kept(given)  # where its code lies does not matter
    pairs = {
        f"{section}.{key}": (getattr(getattr(saved, section), key), getattr(getattr(given, section), key))
        for section, keys in _MATHEMATICS.items()
        for key in keys
    }
    selections = selection_without_paths(saved.data), selection_without_paths(given.data)
    pairs |= {f"data.{key}": (was, selections[1][key]) for key, was in selections[0].items()}
    for section in OPEN_SECTIONS:
        before, after = getattr(saved, section), getattr(given, section)
        pairs |= {f"{section}.{key}": (before.get(key), after.get(key)) for key in {**before, **after}}
    if Duration.parse(saved.train.duration) == Duration.parse(given.train.duration):  # "1 epoch" is "1 epochs"
        del pairs["train.duration"]
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}
