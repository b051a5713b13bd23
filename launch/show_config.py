"""What `shardstep train --show-config` prints: the recipe as it would be trained, and the arithmetic of its batches."""

import torch

from shardstep.configs.load import LoadedRecipe, recipe_text
from shardstep.configs.resolve import choices_of, with_keys
from shardstep.configs.schema import Recipe
from shardstep.trainer import data, resume
from shardstep.trainer.description import batch_text, duration_text
from shardstep.trainer.distributed.world import choose_device
from shardstep.trainer.optim.plan import make_plan
from shardstep.trainer.validate_recipe import validate_recipe


def show_config(loaded: LoadedRecipe, world_size: int) -> None:
    """Print a recipe as YAML that `shardstep train` reads, with the arithmetic in comments. Writes no file.

    Raises:
        InputError: the recipe is invalid, a folder in it holds no shards, or its batch does not fit the data or the ranks.
    """
    recipe = resume.with_earlier_choices(validate_recipe(loaded))
    data.check_given_folders(loaded)
    order_version = data.choose_order_version(recipe.data)
    recipe = with_keys(
        recipe, train={"device": choose_device(recipe.train.device)}, data={"order_version": order_version}
    )
    missing = list(data.missing_sets(recipe.data).values())
    if not missing:
        parts = data.open_parts(recipe.data)
        mode = data.choose_mode(recipe.data, parts, torch.device(recipe.train.device))
        crop_version = data.choose_crop_version(recipe.data, parts)
        recipe = with_keys(recipe, data={"mode": mode, "crop_version": crop_version})
    print(recipe_text(recipe), end="")

    num_samples = None if missing else parts.train.samples
    notes = [*loaded.notes, *_arithmetic(recipe, num_samples, world_size, " and ".join(missing))]
    left = [".".join(place) for place, value in choices_of(recipe).items() if value == "auto"]
    if left:
        notes.append(f"chosen when the run starts, by the data or by measuring: {', '.join(left)}")
    print(*(f"# {text}" for text in notes), sep="\n")


def _arithmetic(recipe: Recipe, num_samples: int | None, world_size: int, missing: str) -> list[str]:
    """Return the lines on batch and duration; without the data set, those that do not need its size."""
    batch, drop_last = recipe.train.global_batch_size, recipe.data.last_batch == "drop"
    if num_samples is None and batch == "full":
        return [f"batch and duration need the number of training samples; there are no shards in {missing}"]
    plan = make_plan(recipe.train, int(batch) if num_samples is None else num_samples, drop_last, world_size)
    lines = [f"batch      {batch_text(plan, recipe.train.max_micro_batch)}"]
    if num_samples is not None or plan.duration.unit == "steps":
        return [*lines, f"duration   {duration_text(plan)}"]
    return [
        *lines,
        f"duration   {plan.duration}; steps per epoch = ceil(training samples / {plan.global_batch_size}) need the data",
        f"there are no shards in {missing}",
    ]
