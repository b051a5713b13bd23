"""Validation sets and folds: never trained on, evaluated during training; the test set only once, at the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.held_out import Fold
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.parts import hold_out
from tests.distributed import run_command, run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

EVERY_STEP = {"log": {"every": "1 steps", "sample_keys": True}, "eval": {"every": "2 steps"}}


def trained_keys(folder: Path) -> list[str]:
    return [line["key"] for path in sorted(folder.glob("samples-rank*.jsonl")) for line in read_lines(path)]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("setting", [{"validation": 0.2}, {"fold": "2/5"}], ids=["share", "fold"])
def test_what_is_held_out_is_not_trained_on(setting: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    runs = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        train_ranks(world_size, write_recipe(folder, shards, data=setting, **EVERY_STEP))
        runs.append(folder / "run")
    opened = open_shards(shards / "train")  # of 101 samples
    _, validation = hold_out(opened, 0.2 if "validation" in setting else Fold(2, 5), 0)
    held_out = {opened.key(sample) for sample in validation.all_ids().tolist()}
    assert len(held_out) == 20
    for run in runs:
        keys = trained_keys(run)
        assert len(keys) == 2 * 81  # two epochs
        assert set(keys) == {opened.key(sample) for sample in range(101)} - held_out
        evaluations = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
        assert {line["set"] for line in evaluations} == {"validation"}
        found = summary_of(run)
        assert {key: found["data"][f"{key}_samples"] for key in ("train", "validation", "test")} == {
            "train": 81,
            "validation": 20,
            "test": 53,
        }
        assert found["validation"]["loss"] == evaluations[-1]["loss"]
        assert found["best"]["accuracy"] == max(line["accuracy"] for line in evaluations)
        answer = json.loads(run_command("evaluate", str(run), cwd=tmp_path).stdout.splitlines()[-1])
        assert answer["samples"] == 53
        assert found["eval"]["loss"] == pytest.approx(answer["loss"], rel=1e-5)
    losses = [[line["loss"] for line in train_lines(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_folder_as_the_validation_set(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data={"validation": str(shards / "test"), "test": str(shards / "train")})
    train_ranks(1, recipe)
    found = summary_of(tmp_path / "run")
    assert (found["data"]["validation_samples"], found["data"]["test_samples"]) == (53, 101)
    assert found["validation"]["loss"] != found["eval"]["loss"]


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_run_without_a_test_set(mode: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data={"validation": 0.2, "test": "none", "mode": mode})
    ((code, output, _),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0
    assert "held out   20 images of the training set for validation; there is no test set" in output
    assert "validation loss" in output
    assert "done: validation accuracy" in output
    found = summary_of(tmp_path / "run")
    assert found["validation"] == found["eval"]
    assert "test_samples" not in found["data"]
    evaluated = run_command("evaluate", str(tmp_path / "run"), cwd=tmp_path).stdout.splitlines()
    assert json.loads(evaluated[-1])["samples"] == 20
    assert json.loads(evaluated[-1])["loss"] == pytest.approx(found["eval"]["loss"], rel=1e-5)
    page = tmp_path / "page.html"
    run_command("report", str(tmp_path / "run"), "--out", str(page), cwd=tmp_path)
    assert "validation accuracy" in page.read_text()
    assert "test accuracy" not in page.read_text()


def test_a_resumed_run_holds_out_the_same(shards: Path, tmp_path: Path) -> None:
    whole, halves = (
        write_recipe(tmp_path / name, shards, data={"validation": 0.2}, **EVERY_STEP) for name in ("whole", "halves")
    )
    train_ranks(1, whole)
    train_ranks(1, halves, "train.duration=4 steps")
    for other in ("data.validation=0.3", "data.split_seed=1", "data.validation=null"):
        ((code, _, stderr),) = run_ranks(1, failure_of, str(halves), other, "run.allow_changes=[train.duration]")
        assert code == 2
        assert other.partition("=")[0] in stderr
    train_ranks(2, halves, "run.allow_changes=[train.duration]")
    assert sorted(trained_keys(tmp_path / "halves" / "run")) == sorted(trained_keys(tmp_path / "whole" / "run"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.001}, "data.validation=0.001 leaves none to validate on"),
        ({"fold": "1/200"}, ""),
        ({"fold": "150/200"}, "data.fold=150/200 leaves none to validate on"),
        ({"validation": "nowhere"}, "no shards in nowhere"),
        ({"test": "none"}, "data.test=none leaves nothing to evaluate on"),
    ],
)
def test_what_leaves_nothing_is_refused(settings: dict[str, Any], message: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data=settings)
    ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe))
    assert code == (2 if message else 0), stderr
    assert message in stderr


def test_one_folder_of_images_needs_no_splits(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 12 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    source = {"source": str(tmp_path / "images"), "train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    recipe = write_recipe(tmp_path, tmp_path, data=source)
    ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert "data.validation=0.1 data.test=none" in stderr
    train_ranks(1, recipe, "data.validation=0.2", "data.test=none", "train.global_batch_size=8")
    assert summary_of(tmp_path / "run")["data"]["validation_samples"] == 4
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize(
    ("change", "forgets"), [("eval.views=mirror", True), ("data.split_seed=1", True), ("eval.batch_size=7", False)]
)
def test_a_best_evaluation_of_another_kind_is_forgotten(
    change: str, forgets: bool, shards: Path, tmp_path: Path
) -> None:
    """Both halves end with their only evaluation, so that what is best afterwards tells whether the first one counts."""
    once = {"eval": {"every": "100 epochs"}, "data": {"validation": 0.3}, "optimizer": {"name": "sgd", "lr": 1e-30}}
    recipe = write_recipe(tmp_path, shards, **once)
    train_ranks(1, recipe, "train.duration=2 steps")
    allowed = ["train.duration", *([change.partition("=")[0]] if forgets else [])]
    train_ranks(1, recipe, "train.duration=4 steps", change, f"run.allow_changes=[{','.join(allowed)}]")
    assert summary_of(tmp_path / "run")["best"]["step"] == (4 if forgets else 2)
