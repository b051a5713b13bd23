"""data.sampling, data.mix and data.repeats in runs: the same on any number of ranks, in both modes and after a resume."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardstep.configs.schema import DataConfig
from shardstep.configs.selection import selection_problems
from shardstep.datasets.manifest import open_shards
from tests.distributed import run_command, run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, train_until, write_recipe

MIXUP = [{"name": "translate", "pixels": 3}, {"name": "mixup", "alpha": 1.0}]
KINDS: dict[str, dict[str, Any]] = {
    "balanced": {"sampling": "balanced", "validation": 0.2},
    "weights": {"sampling": {"weights": "w.csv"}, "window_shards": 2, "lanes": 2},
    "repeats": {"repeats": 3, "augment": MIXUP},
    "mix": {"mix": [{"dir": "train", "weight": 1}, {"dir": "test", "weight": 2.5}], "test": "test"},
    "all": {
        "mix": [{"dir": "train", "weight": 1}, {"dir": "test", "weight": 2}],
        "sampling": "balanced",
        "repeats": 2,
        "augment": MIXUP,
        "fold": "1/4",
        "last_batch": "drop",
    },
}


def keys_of(kind: str, shards: Path, folder: Path) -> dict[str, Any]:
    """The data section of a kind, with the test's own paths."""
    data = json.loads(json.dumps(KINDS[kind]))
    for entry in data.get("mix", []):
        entry["dir"] = str(shards / entry["dir"])
    if "test" in data:
        data["test"] = str(shards / data["test"])
    if kind == "weights":
        opened = open_shards(shards / "train")
        lines = [f"{key},{number % 4}" for number, key in enumerate(opened.keys())]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "w.csv").write_text("\n".join(["key,weight", *lines]))
        data["sampling"]["weights"] = str(folder / "w.csv")
    return data


def consumed(run: Path) -> list[tuple[int, int, int, str]]:
    """Epoch, position, step and key of every sample that a run trained on, in order."""
    lines = [line for path in sorted(run.glob("samples-rank*.jsonl")) for line in read_lines(path)]
    return sorted((line["epoch"], line["position"], line["step"], line["key"]) for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_either_mode_and_a_resume_give_the_same(kind: str, shards: Path, tmp_path: Path) -> None:
    data = keys_of(kind, shards, tmp_path)
    log = {"every": "1 steps", "sample_keys": True}
    recipes = [write_recipe(tmp_path / name, shards, data=data, log=log) for name in ("one", "three", "stopped")]
    train_ranks(1, recipes[0], "data.mode=resident")
    train_ranks(3, recipes[1], "data.mode=stream", "train.max_micro_batch=7")
    run_ranks(1, train_until, str(recipes[2]), 3, "checkpoint.every=1 steps", "data.mode=stream")
    train_ranks(2, recipes[2], "checkpoint.every=1 steps", "data.mode=stream")
    one, *others = (tmp_path / name / "run" for name in ("one", "three", "stopped"))
    for other in others:
        assert consumed(other) == consumed(one)
        losses = [[line["loss"] for line in train_lines(run)] for run in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert max(epoch for epoch, *_ in consumed(one)) == 1


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_shards_order_prints_what_a_run_trains_on(mode: str, shards: Path, tmp_path: Path) -> None:
    data = keys_of("all", shards, tmp_path) | {"fold": None, "mode": mode, "last_batch": "short"}
    recipe = write_recipe(tmp_path, shards, data=data, log={"sample_keys": True}, run={"seed": 3})
    train_ranks(1, recipe, "train.duration=1 epochs", f"run.dir={tmp_path / 'run'}")
    folders, options = [str(shards / name) for name in ("train", "test")], "--sampling balanced --repeats 2 --seed 3"
    printed = run_command("shards", "order", *folders, "--weights", "1,2", *options.split(), cwd=tmp_path).stdout
    assert printed == "".join(f"{position} {key}\n" for _, position, _, key in consumed(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b", "--weights", "1,x"], "--weights or --sampling cannot be read"),
        (["b", "--weights", "1"], "--weights has 1 number for 2 folders"),
        (["--weights", "1"], "--weights 1 has no effect on one folder"),
        (["b", "--weights", "1,-1"], "data.mix[1].weight=-1.0 must be a number above 0"),
        (["--sampling", "{"], "--weights or --sampling cannot be read"),
        (["--sampling", "even"], "data.sampling=even must be uniform"),
        (["--repeats", "0"], "--lanes and --repeats must be at least 1"),
        (["--start", "100", "--count", "2"], "positions 100 to 102 are outside an epoch of 101 samples"),
    ],
)
def test_options_of_shards_order(words: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    result = run_command("shards", "order", str(shards / "train"), *words, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_balanced_classes_come_equally_often(shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    write_unbalanced(source, {"cat": 40, "dog": 7, "owl": 13})
    sets = {"source": str(source), "train": str(tmp_path / "train"), "test": "none", "validation": 0.1}
    recipe = write_recipe(tmp_path, shards, data=sets | {"sampling": "balanced"}, log={"sample_keys": True})
    ((code, output, _),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0
    assert "an epoch   each class comes equally often" in output
    opened = open_shards(tmp_path / "train")
    label_of = dict(zip(opened.keys(), opened.labels.tolist(), strict=True))
    for wanted in (0, 1):
        keys = [key for epoch, _, _, key in consumed(tmp_path / "run") if epoch == wanted]
        assert len(keys) == 54  # an epoch is as long as without: 60 images, 6 held out
        assert Counter(label_of[key] for key in keys) == {0: 18, 1: 18, 2: 18}


def write_unbalanced(folder: Path, classes: dict[str, int]) -> None:
    """A folder of images with so many of each class."""
    from PIL import Image

    for name, images in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (8, 8), (number, number, 99)).save(folder / name / f"{number}.png")


def test_each_image_comes_in_a_row(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data={"repeats": 3}, log={"sample_keys": True})
    ((code, output, stderr),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0
    assert "an epoch   34 samples, each 3 times in a row" in output
    assert "nothing in data.augment makes the copies of an image differ" in stderr
    keys = [key for _, _, _, key in consumed(tmp_path / "run")]
    assert len(keys) == 2 * 101
    for epoch in (keys[:101], keys[101:]):
        assert sorted(Counter(epoch).values()) == [2, *[3] * 33]
    by_step = Counter((step, key) for _, _, step, key in consumed(tmp_path / "run") if step == 1)
    assert set(by_step.values()) == {3}  # 10 samples in a global batch of 30
    assert len(set(keys)) == 68  # the second epoch has other images


def test_a_mix_says_what_it_is(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data=keys_of("mix", shards, tmp_path), log={"sample_keys": True})
    ((code, output, stderr),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0, stderr
    assert f"data.mix replaces data.train={shards}/train" in output
    assert f"an epoch   28.6% of 154 samples from {shards}/train, which is 0.44 times its 101" in output
    assert f"an epoch   71.4% of 154 samples from {shards}/test, which is 2.08 times its 53" in output
    assert {key.rpartition("/")[0] for *_, key in consumed(tmp_path / "run")} == {f"{shards}/train", f"{shards}/test"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data"]["train_samples"], summary["data"]["source"]) == (154, "mix")
    run_command("report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"), cwd=tmp_path)
    evaluated = run_command("evaluate", str(tmp_path / "run"), cwd=tmp_path)
    assert json.loads(evaluated.stdout.splitlines()[-1])["samples"] == 53
    doctor = run_command("doctor", str(recipe), cwd=tmp_path)
    assert f"154 + 53 images 32x32x3 in 10 classes, resident; {shards}/train + {shards}/test" in " ".join(
        doctor.stdout.split()
    )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("balanced", "data.sampling=uniform"),
        ("weights", "data.sampling=balanced"),
        ("repeats", "data.repeats=2"),
        ("mix", "data.mix=[{dir: SHARDS/train, weight: 1}, {dir: SHARDS/test, weight: 2}]"),
        ("mix", "data.train=SHARDS/train"),
    ],
)
def test_a_resume_refuses_another_selection(kind: str, change: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data=keys_of(kind, shards, tmp_path))
    run_ranks(1, train_until, str(recipe), 2, "checkpoint.every=1 steps")
    change = change.replace("SHARDS", str(shards))
    key = "data.mix" if kind == "mix" else change.partition("=")[0]
    ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe), change, "checkpoint.every=1 steps")
    assert code == 2
    assert f"{key}: " in stderr
    assert f"run.allow_changes=[{key}]" in stderr
    ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe), change, f"run.allow_changes=[{key}]")
    assert code == 2
    assert "cannot change in the middle of an epoch" in stderr


@pytest.mark.parametrize("change", ["data.repeats=2", "data.sampling=balanced", "data.mix=[{dir: train, weight: 2}]"])
def test_a_selection_may_change_between_epochs(change: str, shards: Path, tmp_path: Path) -> None:
    data = {"mix": [{"dir": str(shards / "train"), "weight": 1}]}
    recipe = write_recipe(tmp_path, shards, data=data, log={"sample_keys": True})
    run_ranks(1, train_until, str(recipe), 4, "checkpoint.every=1 steps")  # 101 samples, 30 a step
    change, key = change.replace("dir: train", f"dir: {shards}/train"), change.partition("=")[0]
    train_ranks(1, recipe, change, f"run.allow_changes=[{key}]")
    assert len(consumed(tmp_path / "run")) == 2 * 101


def test_a_resume_compares_contents_not_places(shards: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shards, tmp_path / "sets")
    recipe = write_recipe(tmp_path, tmp_path / "sets", data=keys_of("mix", tmp_path / "sets", tmp_path))
    run_ranks(1, train_until, str(recipe), 3, "checkpoint.every=1 steps")
    (tmp_path / "sets").rename(tmp_path / "moved")
    recipe = write_recipe(tmp_path, tmp_path / "moved", data=keys_of("mix", tmp_path / "moved", tmp_path))
    train_ranks(1, recipe)
    swapped = [{"dir": str(tmp_path / "moved" / name), "weight": 1} for name in ("test", "train")]
    equal = [swapped[1], swapped[0]]
    for name, mix in (("equal", equal), ("equal", swapped)):
        recipe = write_recipe(tmp_path / name, tmp_path / "moved", data={"mix": mix})
        ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe))
        assert code == (0 if mix is equal else 2)
    assert "was trained on another data set" in stderr


def test_a_resume_refuses_other_weights_in_the_file(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data=keys_of("weights", shards, tmp_path))
    run_ranks(1, train_until, str(recipe), 3, "checkpoint.every=1 steps")
    table = tmp_path / "w.csv"
    table.write_text(table.read_text().replace(",3", ",7"))
    ((code, _, stderr),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert "or with other weights in the file of data.sampling" in stderr


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"sampling": "balance"}, "data.sampling=balance must be uniform, balanced, {weights:"),
        ({"sampling": None}, "data.sampling=None must be uniform"),
        ({"sampling": 3}, "data.sampling=3 must be uniform"),
        ({"sampling": ["balanced"]}, "data.sampling=['balanced'] must be uniform"),
        ({"sampling": {}}, "data.sampling={} must be uniform"),
        ({"sampling": {"weight": {"cat": 2}}}, "data.sampling={'weight': {'cat': 2}} must be uniform"),
        ({"sampling": {"weights": 3}}, "data.sampling={'weights': 3} must be uniform"),
        ({"sampling": {"weights": {}}}, "data.sampling.weights is empty"),
        ({"sampling": {"weights": {"cat": -1}}}, "the weight of cat must be a number from 0, not -1"),
        ({"sampling": {"weights": {"cat": "2"}}}, "the weight of cat must be a number from 0, not '2'"),
        ({"sampling": {"weights": {"cat": True}}}, "the weight of cat must be a number from 0, not True"),
        ({"sampling": {"weights": {"cat": float("inf")}}}, "the weight of cat must be a number from 0, not inf"),
        ({"sampling": {"weights": {"cat": 10**400}}}, "the weight of cat must be a number from 0, not 1000"),
        ({"sampling": {"weights": {1: 2, "1": 3}}}, "data.sampling gives 1 two weights"),
        ({"sampling": {"weights": {"cat": 1}, "column": "w"}}, "data.sampling.column=w has no effect"),
        ({"sampling": {"weights": "w.csv", "colum": "w"}}, "data.sampling.colum is not a key; did you mean column?"),
        ({"sampling": {"weights": "w.csv", "column": 3}}, "data.sampling.column=3 must be the name of a column"),
        ({"mix": ["a"]}, "data.mix[0]='a' must be a folder and its weight"),
        ({"mix": [{"dir": "a"}]}, "data.mix[0]={'dir': 'a'} must be a folder and its weight"),
        ({"mix": [{"dir": 3, "weight": 1}]}, "data.mix[0].dir=3 must be a folder"),
        ({"mix": [{"dir": "s3://a", "weight": 1}]}, "URLs cannot be read yet"),
        ({"mix": [{"dir": "a", "weight": 0}]}, "data.mix[0].weight=0 must be a number above 0"),
        ({"mix": [{"dir": "a", "weight": float("nan")}]}, "data.mix[0].weight=nan must be a number above 0"),
        ({"mix": [{"dir": "a", "weight": 1, "seed": 1}]}, "data.mix[0].seed is not a key"),
        ({"mix": [{"dir": "a", "weight": 1}, {"dir": "./a", "weight": 2}]}, "twice: add up the weights"),
        ({"mix": [{"dir": "a", "weight": 1}], "sampling": {"weights": "w.csv"}}, "data.mix exclude each other"),
    ],
)
def test_problems(config: dict[str, Any], problem: str) -> None:
    (found,) = selection_problems(DataConfig(**config))
    assert problem in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.repeats=0"], "data.repeats=0 must be at least 1"),
        (["data.repeats=31"], "data.repeats=31 is more than train.global_batch_size=30"),
        (
            ["data.repeats=30", "data.augment=[flip,mixup]"],
            "mixup has no effect with train.global_batch_size=30 and data.r",
        ),
        (["data.sampling={weights: {clas3: 2}}"], "has no class clas3; did you mean"),
        (["data.sampling={weights: nowhere.csv}"], "nowhere.csv cannot be read: No such file or directory"),
        (["data.mix=[{dir: nowhere, weight: 1}]"], "no shards in nowhere"),
        (["data.mix=[{dir: nowhere, weight: 1}]", "data.source=synthetic:9"], "no shards in nowhere"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    ((code, _, stderr),) = run_ranks(1, failure_of, str(write_recipe(tmp_path, shards)), *overrides)
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "run").exists()


def test_the_whole_set_in_one_batch(shards: Path, tmp_path: Path) -> None:
    data = keys_of("all", shards, tmp_path) | {"last_batch": "short"}
    train = {"global_batch_size": "full", "duration": "2 epochs", "device": "cpu", "precision": "fp32"}
    recipe = write_recipe(tmp_path, shards, data=data, train=train, log={"every": "1 steps", "sample_keys": True})
    train_ranks(2, recipe)
    steps = Counter(step for _, _, step, _ in consumed(tmp_path / "run"))
    assert len(set(steps.values())) == 1
    assert np.isfinite([line["loss"] for line in train_lines(tmp_path / "run")]).all()
