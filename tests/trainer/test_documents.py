"""What the documents say about their models, seen on data made for it."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from shardstep.datasets.write import write_shards
from tests.runs import read_lines, train_ranks, write_recipe


def write_pairs(folder: Path, points: list[tuple[int, int]], labels: list[int], split: str) -> None:
    """Images of two pixels, one a point's first coordinate, one its second, as shards."""
    for number, ((first, second), label) in enumerate(zip(points, labels, strict=True)):
        path = folder / "images" / split / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.array([[first, second]], dtype=np.uint8))
    write_shards(str(folder / "images" / split), split, folder / split)


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 points on both sides of x + 2 y = 380, with a gap between them."""
    folder = tmp_path_factory.mktemp("separable")
    corners = np.random.RandomState(0).randint(0, 256, size=(400, 2)).tolist()
    points = [(x, y) for x, y in corners if abs(x + 2 * y - 380) > 40][:60]
    labels = [int(x + 2 * y > 380) for x, y in points]
    for split in ("train", "test"):
        write_pairs(folder, points, labels, split)
    return folder


@pytest.fixture(scope="module")
def xor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four corners; the label is whether exactly one pixel is bright."""
    folder = tmp_path_factory.mktemp("xor")
    points = [(a, b) for a in (0, 255) for b in (0, 255)]
    labels = [int(a != b) for a, b in points]
    for split in ("train", "test"):
        write_pairs(folder, points, labels, split)
    return folder


def train(folder: Path, shards: Path, pictures: bool = False, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Train on one rank; returns the lines of metrics.jsonl."""
    recipe = write_recipe(
        folder, shards, **{"eval": {"every": "10 epochs"}, "checkpoint": {"every": "1000 epochs"}} | sections
    )
    train_ranks(1, recipe, pictures=pictures)
    return read_lines(folder / "run" / "metrics.jsonl")


PERCEPTRON = {
    "model": {"name": "perceptron"},
    "loss": {"name": "perceptron"},
    "optimizer": {"name": "sgd", "lr": 1.0},
}


def test_the_perceptron_leaves_no_error_on_separable_data(separable: Path, tmp_path: Path) -> None:
    lines = train(
        tmp_path,
        separable,
        **PERCEPTRON,
        train={"global_batch_size": 1, "duration": "60 epochs"},
        log={"every": "60 steps"},
    )
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss"] == 0.0
    # and then it stops changing: an example that is right gives no gradient
    assert [line["train_loss"] for line in lines if line["kind"] == "eval"][-1] == 0.0


def test_the_perceptron_fails_on_xor_and_the_mlp_solves_it(xor: Path, tmp_path: Path) -> None:
    length = {"global_batch_size": 1, "duration": "200 epochs"}
    lines = train(tmp_path / "perceptron", xor, **PERCEPTRON, train=length, log={"every": "200 steps"})
    # whichever line it has come to, one side of it holds a corner of the other class
    assert all(line["accuracy"] <= 0.75 for line in lines if line["kind"] == "eval")
    mlp = {"model": {"name": "mlp", "hidden": [8]}, "optimizer": {"name": "adam", "lr": 0.02}}
    assert train(tmp_path / "mlp", xor, **mlp, train=length, log={"every": "200 steps"})[-1]["accuracy"] == 1.0


def test_an_autoencoder_learns_and_leaves_pictures(shards: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"name": "autoencoder", "widths": [16, 8]},
        "loss": {"name": "mse"},
        "optimizer": {"name": "adam", "lr": 0.005},
        "train": {"duration": "30 epochs"},
        "log": {"every": "4 steps"},
    }
    lines = train(tmp_path, shards, pictures=True, **sections)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {line["accuracy"] for line in lines} == {None}
    assert (tmp_path / "run" / "reconstructions.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "confusion.png").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval"] == {"loss": lines[-1]["loss"], "accuracy": None, "top5": None}
