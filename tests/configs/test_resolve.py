"""Recipe to ResolvedRecipe: what was read stays as it was, what comes out has no `auto` and cannot be changed."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from shardstep.configs.load import load_recipe, recipe_text
from shardstep.configs.resolve import CHOICES, Choices, ResolvedRecipe, as_resolved, resolve, with_keys
from shardstep.configs.schema import Recipe

CHOSEN = Choices("stream", "cpu", "bf16", "channels_last", "winograd", 2, 3)


def flat(recipe: Recipe) -> dict[str, Any]:
    """A recipe as section.key: value."""
    sections = dataclasses.asdict(recipe).items()
    return {f"{section}.{key}": value for section, content in sections for key, value in content.items()}


def test_choices_are_put_in_and_nothing_else_changes() -> None:
    recipe = load_recipe("smoke", ["train.precision=auto"]).recipe
    before = flat(recipe)
    after = flat(resolve(recipe, CHOSEN))
    assert flat(recipe) == before
    # smoke itself says cpu and channels_last
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "data.mode": "stream",
        "data.order_version": 2,
        "data.crop_version": 3,
        "train.precision": "bf16",
        "train.convolutions": "winograd",
    }


def test_no_resolved_type_admits_auto() -> None:
    for section, key in CHOICES:
        as_read, resolved = (get_type_hints(get_type_hints(kind)[section])[key] for kind in (Recipe, ResolvedRecipe))
        assert "auto" in str(as_read)
        assert "auto" not in str(resolved), f"{section}.{key}"
        assert get_args(resolved)


@pytest.mark.parametrize("section", ["run", "data", "train", "eval", "checkpoint", "log"])
def test_recipes_are_frozen(section: str) -> None:
    config = getattr(load_recipe("smoke").recipe, section)
    key = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, key, getattr(config, key))


def test_a_copy_has_other_values() -> None:
    recipe = load_recipe("smoke").recipe
    changed = with_keys(recipe, run={"seed": 7}, data={"lanes": 2})
    assert (changed.run.seed, changed.data.lanes, changed.run.name) == (7, 2, recipe.run.name)
    assert (recipe.run.seed, recipe.data.lanes) == (0, 1)
    with pytest.raises(TypeError):
        with_keys(recipe, run={"sede": 7})


def test_the_recipe_of_a_run_is_resolved_and_that_of_an_earlier_version_gets_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(recipe_text(resolve(load_recipe("smoke").recipe, CHOSEN)))
    assert as_resolved(load_recipe(str(path)).recipe).train.convolutions == "winograd"
    path.write_text("model: {name: mlp}\ntrain: {precision: bf16, device: cuda}\n")
    recipe = as_resolved(load_recipe(str(path)).recipe)
    assert (recipe.train.precision, recipe.train.device) == ("bf16", "cuda")
    assert (recipe.train.memory_format, recipe.train.convolutions) == ("contiguous", "direct")
    assert (recipe.data.order_version, recipe.data.crop_version) == (1, 1)
