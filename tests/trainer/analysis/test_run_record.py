"""The record of a run's folder, intact or not."""

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import with_keys
from shardstep.trainer.analysis.run_record import check_comparable, differing_keys, read_record
from shardstep.trainer.checkpoints.lock import LOCK_NAME
from tests.runs import read_lines


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_finished_run(finished_run: Path) -> None:
    record = read_record(finished_run)
    assert record.state == "finished"
    assert record.left_out == []
    assert [line["step"] for line in record.train] == [2, 4, 6, 8]
    assert [line["step"] for line in record.evaluations] == [4, 8]
    assert record.recipe.model["name"] == "whitening_cnn"
    assert record.manifest is not None
    assert record.manifest.samples == 101
    assert record.hardware["cores"] >= 1
    assert record.versions["torch"]
    assert record.starts[0]["command"].startswith("shardstep train ")
    assert record.starts[0]["step"] == 0


def test_state(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for status in ("preempted", "failed"):
        (run / "summary.json").write_text(json.dumps(summary | {"status": status}))
        assert read_record(run).state == status
    (run / "summary.json").write_text(json.dumps(summary | {"status": "preempted", "step": 4}))
    assert read_record(run).state == "killed"  # it went on after step 4, and ended without a word
    (run / "summary.json").unlink()
    record = read_record(run)
    assert (record.state, record.left_out) == ("killed", [])
    with (run / LOCK_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_record(run).state == "running"
    assert read_record(run).state == "killed"


def test_a_cut_last_line_is_no_damage(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "ep')
    record = read_record(run)
    assert record.left_out == []
    assert record.last["step"] == 8


def test_each_missing_or_damaged_file_is_one_line(run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    older = [{"step": 1, "loss": 2.0}, {"kind": "train", "step": "two", "epoch": 1}, ["a"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*older, *lines]))
    (run / "summary.json").write_text('{"status": "fini')
    (run / "starts.json").write_text("[")
    (run / "train_manifest.json").write_text("{}")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("hang_timeout", "patience"))
    told = read_record(run).left_out
    for part in (
        "config.yaml was written by another version",
        "run.patience is not a key",
        "3 of 9 lines of metrics.jsonl: they are damaged, or of another version",
        "summary.json is damaged, or of another version of shardstep",
        "hardware, versions and command",
        "train_manifest.json is damaged",
    ):
        assert any(part in line for line in told), (part, told)
    assert len(told) == 5
    assert all("\n" not in line for line in told)
    for name in ("metrics.jsonl", "summary.json", "starts.json", "train_manifest.json"):
        (run / name).unlink()
    record = read_record(run)
    assert record.state == "killed"
    assert any("curves: metrics.jsonl is missing, or holds no intact line yet" in line for line in record.left_out)
    assert any("train_manifest.json cannot be read: No such file" in line for line in record.left_out)


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not a run's folder: no config\.yaml$"):
        read_record(tmp_path)
    with pytest.raises(InputError, match=r"no config\.yaml; it lies in the run .*run$"):
        read_record(run / "checkpoints" / "step-00000008")
    (run / "config.yaml").write_text("run: {dir: [")
    with pytest.raises(InputError, match="cannot be read as YAML") as caught:
        read_record(run)
    assert "\n" not in str(caught.value)


def test_differing_keys(finished_run: Path) -> None:
    one, other = read_record(finished_run).recipe, read_record(finished_run).recipe
    other = with_keys(other, run={"name": "other", "dir": "elsewhere"})
    assert differing_keys([one, other]) == {}
    other = replace(with_keys(other, run={"seed": 1}), optimizer={"name": "adam", "lr": 0.001})
    found = differing_keys([one, other])
    assert found["run.seed"] == [0, 1]
    assert found["optimizer.name"] == ["sgd", "adam"]
    assert found["optimizer.momentum"] == [0.0, None]


def test_runs_of_two_tasks_are_refused(finished_run: Path) -> None:
    one, other = read_record(finished_run), read_record(finished_run)
    check_comparable([one, other])
    other = replace(other, recipe=replace(other.recipe, loss={"name": "mse"}))
    with pytest.raises(InputError, match=r"different tasks .*has 10 classes \(class0, .*reconstructs images"):
        check_comparable([one, other])
