"""Validate a loaded recipe: resolve its options, check values and combinations, report all problems at once."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from shardstep.configs.components import convert, resolve_options
from shardstep.configs.durations import duration_problems
from shardstep.configs.errors import InputError
from shardstep.configs.held_out import held_out_problems
from shardstep.configs.imported import is_import_path, is_place, with_imported
from shardstep.configs.load import LoadedRecipe
from shardstep.configs.recipe_code import with_places
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.configs.selection import selection_problems
from shardstep.configs.stop_when import stop_when_problems
from shardstep.datasets.augment import AUGMENTATIONS, augment_problems
from shardstep.datasets.framing import LARGEST_SIDE, RANDOM_CROP, RandomResizedCrop, random_crop_problems
from shardstep.trainer import models
from shardstep.trainer.data import missing_sets
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.gradients import gradient_sync_problems
from shardstep.trainer.distributed.world import choose_device
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, excludes
from shardstep.trainer.monitoring import profiler
from shardstep.trainer.optim import average, losses, optimizers, schedules

NAMED: dict[str, tuple[Mapping[str, Callable], Mapping[str, tuple[Any, Any]]]] = {
    "model": (models.MODELS, models.COMMON_OPTIONS),
    "loss": (losses.LOSSES, losses.COMMON_OPTIONS),
    "optimizer": (optimizers.OPTIMIZERS, optimizers.COMMON_OPTIONS),
    "schedule": (schedules.SCHEDULES, schedules.COMMON_OPTIONS),
    "average": (average.AVERAGES, {}),
    "augment": ({RANDOM_CROP: RandomResizedCrop, **AUGMENTATIONS}, {}),
}
"""The functions that each open section, and each entry of data.augment, can name, and the options that go with any name."""
_AT_LEAST = {
    "data.workers": 0, "data.lanes": 1, "data.resize": 1, "data.repeats": 1, "train.max_micro_batch": 1, "train.threads": 1,
    "train.world_size": 1, "eval.batch_size": 1, "checkpoint.keep": 1, "train.max_skipped_steps": 0, "run.seed": 0,
}  # fmt: skip
_ABOVE_0 = ("train.clip_norm", "train.clip_value", "train.max_wall_s", "run.hang_timeout")
_CHECKS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "optimizer": optimizers.check_optimizer,
    "loss": losses.check_loss,
    "schedule": schedules.check_schedule,
    "average": average.check_average,
}


def validate_recipe(loaded: LoadedRecipe) -> Recipe:
    """Resolve every option of a recipe for this machine's device, and check what needs neither data nor ranks.

    Imports the code that the recipe names by import path, so that names become places; without `loaded.folders` they stay as
    they are, with the options that they have.

    Raises:
        InputError: lists all problems, including those found while loading.
    """
    notes = loaded.notes
    if loaded.for_device:
        loaded = loaded.for_device(choose_device(loaded.recipe.train.device))
    recipe, problems = _with_data_of_model(loaded, notes), list(loaded.problems)
    if loaded.folders:
        recipe, missing = with_places(recipe, loaded.folders)
        if not missing_sets(recipe.data):  # nothing is written from the source, which may be gone
            missing.pop("data.source", None)
        if missing:
            problem = InputError.from_problems(f"recipe {loaded.source}", [*problems, *missing.values()])
            problem.everywhere = not launch_env.is_first_rank_of_node()  # perhaps only on this node
            raise problem
    resolved_sections: dict[str, Any] = {}
    for section in OPEN_SECTIONS:
        functions, common = NAMED[section]
        given = getattr(recipe, section)
        name = given.get("name")
        if is_import_path(name) and not is_place(name):  # of a run that is resumed
            continue
        if section == "model":  # torchvision's are listed only for a name that may be one of them
            functions = models.models_for(str(name))
        elif section == "optimizer":
            functions = optimizers.optimizers_for(name)
        refused = optimizers.CANNOT_WORK.get(str(given.get("name")).lower()) if section == "optimizer" else None
        if refused:
            problems.append(f"optimizer.name={given['name']} cannot work here: {refused}")
            continue
        resolved, found = resolve_options(section, given, with_imported(functions, name), common)
        if not found and section in _CHECKS:
            found = _CHECKS[section](resolved)
        resolved_sections[section] = resolved
        problems += found

    augment, found = _resolve_augment(recipe)
    recipe = replace(recipe, data=replace(recipe.data, augment=augment), **resolved_sections)
    problems += found
    for check in (_check_durations, _check_values, _check_combinations, _check_normalize):
        problems += check(recipe)
    problems += stop_when_problems(recipe.train.stop_when, recipe.data)
    problems += held_out_problems(recipe.data) + selection_problems(recipe.data) + gradient_sync_problems(recipe.train)
    if not problems:
        problems += optimizers.check_schedule_has_effect(recipe.optimizer, recipe.schedule)
        problems += random_crop_problems(recipe.data)
    if problems:
        raise InputError.from_problems(f"recipe {loaded.source}", problems)
    return recipe


def _with_data_of_model(loaded: LoadedRecipe, notes: list[str]) -> Recipe:
    """Return the recipe with the sizes and statistics that a model of timm expects, where it gives none; append a note.

    Images get the model's size; with random_resized_crop, evaluation cuts it out of what its crop share makes larger.
    """
    recipe = loaded.recipe
    name, data = recipe.model.get("name"), recipe.data
    if not (isinstance(name, str) and name.startswith(models.TIMM)) or name not in models.models_for(name):
        return recipe
    from shardstep.trainer.models.timm_models import data_config

    config = data_config(name)
    size = config["input_size"][-1]
    keys: dict[str, Any] = {}
    if ("data", "normalize") not in loaded.given:
        keys["normalize"] = {"mean": list(config["mean"]), "std": list(config["std"])}
    first = data.augment[0] if data.augment else None
    crop = {"name": first} if isinstance(first, str) else first
    if isinstance(crop, dict) and crop.get("name") == RANDOM_CROP:
        scaling = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        crop = {"size": size, "interpolation": scaling} | crop
        keys["augment"] = [crop, *data.augment[1:]]
        if ("data", "resize") not in loaded.given:
            keys["resize"] = max(crop["size"], int(crop["size"] / config["crop_pct"]))
    elif ("data", "resize") not in loaded.given:
        keys["resize"] = size
    if keys:
        shown = ", ".join(f"data.{key}={value}" for key, value in keys.items())
        notes.append(f"as {name} expects: {shown}")
    return replace(recipe, data=replace(data, **keys))


def _resolve_augment(recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    resolved, problems = [], []
    for place, entry in enumerate(recipe.data.augment):
        given = {"name": entry} if isinstance(entry, str) else entry
        where = f"data.augment[{place}]"
        if not isinstance(given, dict):
            problems.append(f"{where} must be a name, or a mapping of a name and its options, not {entry!r}")
            continue
        name, (functions, common) = given.get("name"), NAMED["augment"]
        if is_import_path(name) and not is_place(name):
            resolved.append(given)
            continue
        section, found = resolve_options(where, given, with_imported(functions, name), common)
        resolved.append(section)
        problems += found
    return resolved, problems or augment_problems(resolved, recipe.train.global_batch_size, recipe.data.repeats)


def _check_durations(recipe: Recipe) -> list[str]:
    problems = duration_problems({
        "train.duration": recipe.train.duration,
        "eval.every": recipe.eval.every,
        "checkpoint.every": recipe.checkpoint.every,
        "log.every": recipe.log.every,
    })  # fmt: skip
    try:
        profiler.parse_steps(recipe.train.profile)
    except InputError as error:
        problems.append(f"train.profile: {error}")
    return problems


def _check_values(recipe: Recipe) -> list[str]:
    """Return the keys whose values are out of range."""
    problems = []
    batch, window = recipe.train.global_batch_size, recipe.data.window_shards
    if not (batch == "full" or (isinstance(batch, int) and batch >= 1)):
        problems.append(f"train.global_batch_size={batch} must be a whole number from 1, or full")
    if not (window in ("auto", "all") or (isinstance(window, int) and window >= 1)):
        problems.append(f"data.window_shards={window} must be a whole number from 1, or auto, or all")
    name = recipe.run.name
    strange = not name.isprintable() or name != name.strip() or Path(name).is_absolute() or ".." in Path(name).parts
    if strange and recipe.run.dir == f"runs/{name}":
        problems.append(
            f"run.name={name!r} must be a name within runs/, of printable characters: for another place give run.dir"
        )
    if recipe.data.resize is not None and recipe.data.resize > LARGEST_SIDE:
        problems.append(f"data.resize={recipe.data.resize} must be at most {LARGEST_SIDE} pixels")
    problems += [
        f"{key}={value} must be at least {least}"
        for key, least in _AT_LEAST.items()
        if (value := attrgetter(key)(recipe)) is not None and value < least
    ]
    problems += [
        f"{key}={value} must be above 0; null turns it off"
        for key in _ABOVE_0
        if (value := attrgetter(key)(recipe)) is not None and not value > 0
    ]
    sure = recipe.eval.sure_above
    if sure is not None and not 0 < sure <= 1:
        problems.append(f"eval.sure_above={sure} must be a probability, above 0 and at most 1; null turns it off")
    if not 0 < recipe.eval.threshold < 1:
        problems.append(f"eval.threshold={recipe.eval.threshold} must be a probability between 0 and 1")
    if recipe.run.seed >= 2**63:
        problems.append(f"run.seed={recipe.run.seed} must be below 2**63")
    if not 0 < recipe.train.timeout_s < 10**7:
        problems.append(f"train.timeout_s={recipe.train.timeout_s} must be a number of seconds above 0 and below 10**7")
    for key in ("train", "validation", "test"):
        place = getattr(recipe.data, key)
        if "://" in str(place):
            problems.append(f"data.{key}={place}: shards must be in a folder; URLs cannot be read yet")
    if recipe.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        problems.append("log.tensorboard=true, but TensorBoard is not installed: pip install 'shardstep[tensorboard]'")
    return problems


def _check_combinations(recipe: Recipe) -> list[str]:
    """Return the keys whose values contradict each other."""
    problems = []
    if recipe.train.max_wall_s is not None and recipe.schedule.get("name") in schedules.ENDS_WITH_RUN:
        problems.append(
            f"schedule.name={recipe.schedule['name']} spans train.duration, which train.max_wall_s may cut short, so the "
            f"learning rate would not reach its end: use schedule.name=constant, step, multistep or exponential"
        )
    if recipe.train.clip_norm is not None and recipe.train.clip_value is not None:
        problems.append("train.clip_norm and train.clip_value exclude each other")
    if recipe.run.hang_timeout is not None and recipe.run.hang_timeout >= recipe.train.timeout_s:
        problems.append(
            f"run.hang_timeout={recipe.run.hang_timeout} must be below train.timeout_s={recipe.train.timeout_s}, or the "
            f"collectives give up first, without saying which rank hangs"
        )
    if recipe.train.weights == "half" and recipe.train.precision not in ("bf16", "fp16"):
        problems.append(f"train.weights=half needs train.precision=bf16 or fp16, not {recipe.train.precision}")
    method = recipe.train.convolutions
    if method in CONVOLUTION_METHODS:
        precisions = " and ".join(CONVOLUTION_METHODS[method].precisions)
        problems += [
            f"train.convolutions={method} is for {precisions} on a CPU, not for {other}: use auto or direct"
            for other in excludes(recipe.train, method)
        ]
    if recipe.eval.sure_above is not None and recipe.eval.views == "plain":
        problems.append("eval.sure_above has no effect with eval.views=plain: there are no further views")
    if recipe.eval.views != "plain" and recipe.loss.get("name") in losses.RECONSTRUCTION:
        problems.append(f"eval.views={recipe.eval.views} has no effect on reconstructions: use plain")
    batch, repeats = recipe.train.global_batch_size, recipe.data.repeats
    if isinstance(batch, int) and batch < repeats:
        problems.append(
            f"data.repeats={repeats} is more than train.global_batch_size={batch}: the copies of a sample would not come in "
            f"one step"
        )
    if recipe.train.global_batch_size == "full" and recipe.data.last_batch == "drop":
        problems.append("data.last_batch=drop has no effect with train.global_batch_size=full: an epoch is one batch")
    if recipe.log.wandb == "disabled" and recipe.log.wandb_artifacts != "none":
        problems.append(f"log.wandb_artifacts={recipe.log.wandb_artifacts} has no effect with log.wandb=disabled")
    if recipe.data.source is None:
        problems += [
            f"data.{key}={value} has no effect without data.source, whose labels it says"
            for key in ("labels", "image_column", "label_column", "label_separator")
            if (value := getattr(recipe.data, key)) is not None
        ]
    return problems


def _check_normalize(recipe: Recipe) -> list[str]:
    normalize = recipe.data.normalize
    if normalize in ("manifest", "none"):
        return []
    if not isinstance(normalize, dict) or set(normalize) != {"mean", "std"}:
        return [f"data.normalize={normalize} must be manifest, none, or {{mean: [...], std: [...]}}"]
    try:
        numbers = {key: convert(normalize[key], list[float]) for key in ("mean", "std")}
    except ValueError as error:
        return [f"data.normalize: {error}"]
    if len(numbers["mean"]) != len(numbers["std"]) or len(numbers["mean"]) not in (1, 3):
        return ["data.normalize: mean and std must both have 1 or 3 numbers"]
    if not all(math.isfinite(value) for values in numbers.values() for value in values) or min(numbers["std"]) <= 0:
        return ["data.normalize: every mean must be finite, every std finite and above 0"]
    return []
