"""A run on JPEGs of several sizes: random parts in training, centres otherwise, the same in everything that comes after."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.transforms import v2

from shardstep.configs.load import load_recipe
from shardstep.configs.resolve import with_keys
from shardstep.configs.schema import CropVersion
from shardstep.datasets import native
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.parts import Part
from shardstep.launch import evaluate, export, predict
from shardstep.launch.cli import run as run_command
from shardstep.trainer import data
from shardstep.trainer.analysis.trained_model import open_trained_model
from shardstep.trainer.doctor.session import _decoder_findings
from shardstep.trainer.validate_recipe import validate_recipe
from tests.distributed import run_ranks
from tests.photographs import photograph_shards
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

CROP = {"name": "random_resized_crop", "size": 24, "scale": [0.3, 1.0]}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of JPEGs, and the files that they were made of, in files/."""
    return photograph_shards(tmp_path_factory.mktemp("photographs"), train=61, test=23)


@pytest.fixture(scope="module")
def run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    folder = tmp_path_factory.mktemp("run")
    train_ranks(1, write_recipe(folder, photographs, data={"augment": [CROP, "flip"]}))
    return folder / "run"


def test_it_trains_without_resize_and_says_how(run: Path) -> None:
    config = load_recipe(str(run / "config.yaml")).recipe.data
    assert (config.mode, config.crop_version, config.resize) == ("stream", 3, None)


def test_two_ranks_train_on_the_same_pixels(run: Path, photographs: Path, tmp_path: Path) -> None:
    train_ranks(2, write_recipe(tmp_path, photographs, data={"augment": [CROP, "flip"]}))
    losses = [[line["loss"] for line in train_lines(folder)] for folder in (run, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_stopped_run_goes_on_bitwise(run: Path, photographs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, photographs, data={"augment": [CROP, "flip"]})
    train_ranks(1, recipe, "train.duration=4 steps")  # of 3 in an epoch: in the middle of the second
    changed = (str(recipe), "run.allow_changes=[train.duration]", "data.crop_version=2")
    ((code, _, err),) = run_ranks(1, failure_of, *changed)
    assert code == 2
    assert "data.crop_version: 3 -> 2" in err
    train_ranks(1, recipe, "run.allow_changes=[train.duration]")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_everything_reads_the_same_centres(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert run_command(evaluate.main, [str(run), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(evaluation["loss"], rel=1e-6)

    trained = open_trained_model(run, "cpu")
    _, reader = trained.open_test_set()
    pixels, _ = reader.read(np.arange(23))
    assert pixels.shape == (23, 24, 24, 3)
    outputs = trained.module(trained.normalize(pixels)).detach().softmax(dim=1).max(dim=1).values
    assert predict.main([str(run), str(photographs / "files" / "test"), "--json", "--device", "cpu"]) == 0
    confidences = [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(confidences) == pytest.approx(sorted(outputs.tolist()), abs=1e-5)

    out = tmp_path / "exported.safetensors"
    assert run_command(export.main, [str(run), "--format", "safetensors", "--out", str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        described = json.loads(file.metadata()["shardstep"])["input"]
    assert "bilinear with antialiasing, as by Pillow, to just cover 27x27" in described["resize"]  # 24 / 0.875 = 27.4
    transform = eval(described["torchvision"], {"v2": v2})
    files = sorted((photographs / "files" / "test").rglob("*.jpg"))
    by_torchvision = torch.stack([v2.functional.pil_to_tensor(transform(Image.open(f).convert("RGB"))) for f in files])
    ours = trained.normalize(by_torchvision.permute(0, 2, 3, 1).contiguous())
    assert trained.module(ours).softmax(dim=1).max(dim=1).values.sort().values.tolist() == pytest.approx(
        sorted(outputs.tolist()), abs=0.02
    )


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["data.resize=24"], 3),
        (["data.resize=24", "data.crop_version=1"], 1),
        (["data.resize=24", "data.crop_version=2"], 2),
        (["data.augment=[random_resized_crop]"], 3),
        ([], 2),  # nothing is cut
    ],
)
def test_the_crop_version(photographs: Path, shards: Path, keys: list[str], chosen: CropVersion) -> None:
    recipe = validate_recipe(load_recipe("smoke", [f"data.train={shards}/train", f"data.test={shards}/test", *keys]))
    jpegs, pngs = (Part(open_shards(folder / "train")) for folder in (photographs, shards))
    of_jpegs, of_pngs = (data.Parts(part, part, part, "test", "test") for part in (jpegs, pngs))
    assert data.choose_crop_version(recipe.data, of_jpegs) == chosen
    assert data.choose_crop_version(recipe.data, of_pngs) == (2 if recipe.data.crop_version == "auto" else chosen)


def test_a_machine_that_cannot_decode_parts(
    run: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native.missing.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        recipe = write_recipe(tmp_path, photographs, data={"augment": [CROP]})
        loaded = validate_recipe(load_recipe(str(recipe)))
        assert data.choose_crop_version(loaded.data, data.open_parts(loaded.data)) == 2
        code, _, err = failure_of(str(recipe), "data.crop_version=3")
        assert code == 2
        assert "data.crop_version=3 needs libjpeg's header and a C compiler (there is no no-such-compiler)" in err
        for version, severity in ((2, "warning"), (3, "error")):
            chosen = with_keys(loaded, data={"crop_version": version})
            (finding,) = _decoder_findings(chosen, data.open_parts(loaded.data))
            assert finding.severity == severity
            assert "libjpeg's header and a C compiler (there is no no-such-compiler)" in finding.what
        # a finished run is still of use there
        assert run_command(evaluate.main, [str(run), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "JPEGs are decoded entirely, unlike in the run: pixels differ by less than 1 of 255 on average" in out
    finally:
        native.missing.cache_clear()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.augment=[flip,random_resized_crop]"], "give it once, as the first entry"),
        (["data.augment=[random_resized_crop,random_resized_crop]"], "give it once, as the first entry"),
        (["data.augment=[{name: random_resized_crop, size: 0}]"], "size: 0 must be at least 1"),
        (["data.augment=[{name: random_resized_crop, size: 20000}]"], "size=20000 must be at most 16384 pixels"),
        (["data.augment=[{name: random_resized_crop, scale: [0, 1]}]"], "scale=[0.0, 1.0] must be two shares"),
        (["data.augment=[{name: random_resized_crop, scale: [0.5, 1.5]}]"], "scale=[0.5, 1.5] must be two shares"),
        (["data.augment=[{name: random_resized_crop, scale: 0.5}]"], "scale"),
        (["data.augment=[{name: random_resized_crop, ratio: [2, 1]}]"], "ratio=[2.0, 1.0] must be two numbers above 0"),
        (["data.augment=[{name: random_resized_crop, interpolation: cubic}]"], "interpolation"),
        (["data.augment=[{name: random_resized_crop, sise: 8}]"], "sise is not an option of random_resized_crop"),
        (["data.augment=[random_resized_crop]", "data.resize=200"], "data.resize=200 must be at least the size"),
        (["data.augment=[random_resized_crop]", "data.mode=resident"], "use data.mode=stream or auto"),
        (["data.augment=[random_resized_crop]", "data.crop_version=1"], "data.crop_version=1 knows no"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        validate_recipe(load_recipe("smoke", keys))
    assert message in str(raised.value)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_crops_are_the_same_on_any_number_of_ranks(mix: str, photographs: Path, tmp_path: Path) -> None:
    """A partner is cut as at its own position, though another rank trains on it."""
    losses = []
    for world_size in (1, 2, 3):
        recipe = write_recipe(tmp_path / str(world_size), photographs, data={"augment": [CROP, "flip", mix]})
        train_ranks(world_size, recipe, "train.max_micro_batch=3", "train.duration=3 steps")
        losses.append([line["loss"] for line in train_lines(tmp_path / str(world_size) / "run")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
