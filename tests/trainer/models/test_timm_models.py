"""timm's classifiers by name: their options, what their weights expect of the images, and their weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shardstep.configs.components import resolve_options
from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.trainer.models import COMMON_OPTIONS, build_model, models_for
from shardstep.trainer.models.timm_models import pretrained_weights
from shardstep.trainer.validate_recipe import validate_recipe
from tests.runs import read_lines, train_ranks, write_recipe

timm = pytest.importorskip("timm")
NAME = "timm/test_resnet"  # a small one that timm has for tests


def build(name: str, shape: tuple[int, int, int], classes: int = 7, **options: Any) -> torch.nn.Module:
    section, problems = resolve_options("model", {"name": name, **options}, models_for(name), COMMON_OPTIONS)
    assert not problems
    return build_model(section, shape, classes)


@pytest.mark.parametrize(("name", "shape"), [
    (NAME, (3, 64, 64)), (NAME, (1, 64, 64)), (f"{NAME}.r160_in1k", (3, 64, 64)), ("timm/test_vit", (3, 64, 64)),
    ("timm/test_efficientnet", (3, 32, 32)),
])  # fmt: skip
def test_models_take_images_of_the_set(name: str, shape: tuple[int, int, int]) -> None:
    assert build(name, shape).eval()(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("timm/test_vit", {}, "give data.resize=160"),
    ("timm/resnet18", {"drop_path": 0.1}, None),
    ("timm/vgg11", {"drop_path": 0.1}, "it does not take 'drop_path_rate'"),
])  # fmt: skip
def test_what_does_not_fit(name: str, options: dict[str, Any], message: str | None) -> None:
    shape = (3, 37, 41)
    if message is None:
        build(name, (3, 64, 64), **options)
    else:
        with pytest.raises(InputError, match=message):
            build(name, shape, **options)


def test_an_unknown_name_gets_its_neighbours() -> None:
    _, problems = resolve_options("model", {"name": "timm/resnet19"}, models_for("timm/resnet19"), COMMON_OPTIONS)
    assert "did you mean timm/resnet1" in problems[0]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'shardstep\[timm\]'"):
        models_for("timm/resnet18")


STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
OWN = {"normalize": "none", "resize": 40}


@pytest.mark.parametrize(("data", "resize", "crop"), [
    ({}, 160, None),
    (OWN, 40, None),
    ({"augment": ["random_resized_crop", "flip"]}, 168, (160, "bilinear")),
    ({"augment": [{"name": "random_resized_crop", "size": 96, "interpolation": "bicubic"}]}, 101, (96, "bicubic")),
    ({"augment": [{"name": "random_resized_crop", "size": 32}], "resize": 40}, 40, (32, "bilinear")),
])  # fmt: skip
def test_what_the_weights_expect_is_the_default(
    data: dict[str, Any], resize: int, crop: tuple[int, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": data, "model": {"name": NAME}, "optimizer": {"name": "sgd"}}))
    loaded = load_recipe(str(path))
    recipe = validate_recipe(loaded)
    expected = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_resnet").to_dict())
    statistics = {"mean": list(expected["mean"]), "std": list(expected["std"])}
    assert recipe.data.normalize == data.get("normalize", statistics)
    assert recipe.data.resize == resize
    if crop:
        assert (recipe.data.augment[0]["size"], recipe.data.augment[0]["interpolation"]) == crop
    assert any(note.startswith(f"as {NAME} expects: data.") for note in loaded.notes) == (data != OWN)


def test_a_run_keeps_what_it_began_with(shards: Path, tmp_path: Path) -> None:
    """And its weights fit into the same model for other classes, by timm's own name."""
    recipe = write_recipe(
        tmp_path,
        shards,
        model={"name": NAME},
        data={"resize": 32},
        train={"duration": "1 steps", "global_batch_size": 8},
    )
    train_ranks(2, recipe)
    run = tmp_path / "run"
    kept = validate_recipe(load_recipe(str(run / "config.yaml")))
    assert kept.data.normalize != "manifest"
    assert len(read_lines(run / "metrics.jsonl")) >= 2
    net = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(run / "model.safetensors"))
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"the weights of timm/test_resnet cannot be had .*give model.pretrained=PATH"):
        pretrained_weights(NAME, (3, 64, 64))
