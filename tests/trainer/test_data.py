"""The two sets of a recipe: what must match, and the mode that both are read in."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.errors import InputError
from shardstep.configs.schema import DataConfig
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.write import write_shards
from shardstep.launch import predict
from shardstep.trainer.analysis.trained_model import open_trained_model
from shardstep.trainer.data import check_same_task, open_parts, shared_images, unlearnable_classes
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_ranks, write_recipe


def write_images(folder: Path, split: str, mode: str, size: int = 8, classes: int = 2) -> Path:
    """A set of 12 random images in `mode`."""
    draw = np.random.default_rng(["train", "test"].index(split))
    for number in range(12):
        path = folder / "tree" / split / str(number % classes) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode).save(path)
    write_shards(str(folder / "tree"), split, folder / split)
    return folder / split


@pytest.mark.parametrize(("modes", "data_mode"), [(("RGB", "L"), "stream"), (("L", "RGB"), "resident")])
def test_the_training_sets_mode_rules(
    modes: tuple[str, str], data_mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (write_images(tmp_path, split, mode) for split, mode in zip(("train", "test"), modes, strict=True))
    assert [open_shards(folder).manifest.image_mode for folder in (train, test)] == list(modes)
    train_ranks(1, write_recipe(tmp_path, tmp_path, data={"mode": data_mode}, train={"global_batch_size": 6}))

    trained = open_trained_model(tmp_path / "run", "cpu")
    test_set, reader = trained.open_test_set()
    stored = StreamReader(test_set.shards).read(np.arange(12))[0].numpy()  # in the test set's own mode
    as_trained = [np.array(Image.fromarray(image.squeeze()).convert(modes[0])).reshape(8, 8, -1) for image in stored]
    pixels, labels = reader.read(np.arange(12))
    assert np.array_equal(pixels.numpy(), as_trained)
    shares = trained.module(trained.normalize(pixels)).detach().softmax(dim=1)
    evaluation = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert evaluation["accuracy"] == pytest.approx(float((shares.argmax(dim=1) == labels).float().mean()))

    assert predict.main([str(tmp_path / "run"), str(tmp_path / "tree" / "test"), "--json", "--device", "cpu"]) == 0
    predicted = [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()[-12:]]
    assert sorted(predicted) == pytest.approx(sorted(shares.max(dim=1).values.tolist()), abs=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [({"size": 9}, "images of different sizes"), ({"classes": 3}, "different classes"), ({"mode": "L"}, None)],
)
def test_what_two_sets_must_share(other: dict[str, int], message: str | None, tmp_path: Path) -> None:
    one = open_shards(write_images(tmp_path / "a", "train", "RGB")).manifest
    changed = open_shards(write_images(tmp_path / "b", "test", **{"mode": "RGB", **other})).manifest  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_same_task(one, changed, "a", "b", None)


@pytest.mark.parametrize(
    ("shared", "config", "expected"),
    [
        ("the folder", {}, "12 of 12 test images are also in the training set"),
        ("a link", {}, "12 of 12 test images are also in the training set"),
        ("other shards", {}, "12 of 12 test images are also in the training set"),
        ("a part", {}, "1 of 12 test images are also in the training set"),
        ("nothing", {}, None),
        # 11 of 12 images are trained on: round(0.1 * 12) = 1 is held out
        ("the folder", {"validation": 0.1}, "11 of 12 test images are also in the training set"),
        ("nothing", {"validation": 0.1}, None),
        ("nothing", {"validation": "train"}, "12 of 12 validation images are also in the training set"),
        ("nothing", {"validation": "test"}, "12 of 12 test images are also in the validation set"),
        ("nothing", {"validation": 0.5, "test": "none"}, None),
    ],
)
def test_images_that_two_sets_share_are_told(
    shared: str, config: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    train, test = (write_images(tmp_path, split, "RGB") for split in ("train", "test"))
    if shared == "the folder":
        test = train
    elif shared == "a link":
        test = tmp_path / "link"
        test.symlink_to(train)
    elif shared == "other shards":
        write_shards(str(tmp_path / "tree"), "train", test := tmp_path / "again", samples_per_shard=5, seed=1)
    elif shared == "a part":
        images = tmp_path / "tree"
        shutil.copy(images / "train" / "0" / "0.png", images / "test" / "0" / "0.png")
        write_shards(str(images), "test", test := tmp_path / "again")
    folders = {"train": str(train), "test": str(test)}
    chosen = {key: folders.get(value, value) for key, value in config.items()}
    found = shared_images(open_parts(DataConfig(**(folders | chosen))))
    assert found == expected


@pytest.mark.parametrize(
    ("classes", "config", "expected"),
    [
        (2, {}, None),
        (1, {}, "the only class is 0: every prediction is correct, and nothing is learnt"),
        (12, {}, None),
        # half of the twelve classes of one image each
        (12, {"validation": 0.5, "test": "none"}, "6 of 12 classes have no training images, so nothing is learnt"),
    ],
)
def test_classes_that_cannot_be_learnt_are_told(
    classes: int, config: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    folders = {split: str(write_images(tmp_path, split, "RGB", classes=classes)) for split in ("train", "test")}
    found = unlearnable_classes(open_parts(DataConfig(**(folders | config))).train)
    assert (found is None) == (expected is None)
    assert expected is None or (found is not None and found.startswith(expected))


def test_a_run_on_one_set_for_both_warns(tmp_path: Path) -> None:
    write_images(tmp_path, "train", "RGB")
    recipe = write_recipe(
        tmp_path,
        tmp_path,
        data={"test": str(tmp_path / "train")},
        train={"global_batch_size": 6, "duration": "1 steps"},
    )
    told = [out + err for _, out, err in run_ranks(2, failure_of, str(recipe))]
    line = "12 of 12 test images are also in the training set; a model knows the images"
    assert [text.count(line) for text in told] == [1, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
