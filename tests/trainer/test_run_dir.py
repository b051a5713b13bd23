"""RunDir: one vocabulary for the state of a run, and what its files hold."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.checkpoints.lock import LOCK_NAME
from shardstep.trainer.run_dir import RunDir, State

EARLY_S, LATE_S = 1_000_000_000, 1_000_000_100


def make_run(folder: Path, newest_step: int, summary: dict[str, Any] | None, summary_s: float) -> RunDir:
    """A folder whose config.yaml is of EARLY_S, and whose summary, if any, is of `summary_s`."""
    run = RunDir(folder)
    run.config_path.write_text("model: {name: mlp}\n")
    lines = ({"kind": "train", "step": step} for step in range(1, newest_step + 1))
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (run.config_path, run.metrics_path):
        os.utime(path, (EARLY_S, EARLY_S))
    if summary is not None:
        run.summary_path.write_text(json.dumps(summary))
        os.utime(run.summary_path, (summary_s, summary_s))
    return run


@pytest.mark.parametrize(
    ("newest_step", "summary", "summary_s", "state"),
    [
        (4, {"status": "finished", "step": 4}, LATE_S, "finished"),
        (4, {"status": "failed", "step": 4}, LATE_S, "failed"),
        (4, {"status": "preempted", "step": 4}, LATE_S, "preempted"),  # of an earlier version
        (4, {"status": "preempted", "step": 4, "stopped_by": "signal"}, LATE_S, "preempted"),
        (4, {"status": "preempted", "step": 4, "stopped_by": "person"}, LATE_S, "stopped"),
        (6, {"status": "preempted", "step": 4}, LATE_S, "killed"),  # it went on
        (4, {"status": "finished", "step": 4}, EARLY_S - 100, "finished"),  # started again, with nothing to do
        (6, {"status": "finished", "step": 4}, EARLY_S - 100, "killed"),  # extended, and killed
        (4, {"status": "splendid", "step": 4}, LATE_S, "killed"),  # of a later version, perhaps
        (4, None, 0, "killed"),
    ],
)
def test_state(
    newest_step: int, summary: dict[str, Any] | None, summary_s: float, state: State, tmp_path: Path
) -> None:
    assert make_run(tmp_path, newest_step, summary, summary_s).state() == state


def test_a_locked_folder_is_running_unless_its_summary_is_of_this_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, {"status": "preempted", "step": 4}, EARLY_S - 100)
    with (tmp_path / LOCK_NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.state() == "running"
        os.utime(run.summary_path, (LATE_S, LATE_S))
        assert run.state() == "preempted"  # it is only saying goodbye to Weights & Biases


def test_a_run_that_moved_just_now_is_not_taken_for_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, None, 0)
    os.utime(run.metrics_path)
    assert run.state(grace_s=60) == "running"
    assert run.state() == "killed"


def test_what_cannot_be_read_is_empty(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "nothing")
    assert (run.summary, run.starts, run.metrics(), run.checkpoints) == ({}, [], [], [])
    run = make_run(tmp_path, 1, None, 0)
    run.summary_path.write_text("[1")
    run.starts_path.write_text("{}")
    run.metrics_path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert (run.summary, run.starts) == ({}, [])
    assert [line["step"] for line in run.metrics()] == [1]
    assert [line is None for line in run.read_metrics()] == [False, True]


@pytest.mark.parametrize("text", ["[1", "[1]", '{"status": "splendid"}', '{"status": "failed", "step": "4"}'])
def test_a_damaged_summary_is_an_error_for_those_who_ask(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_summary() == {}  # there is none
    run.summary_path.write_text(text)
    with pytest.raises(InputError, match=r"summary.json is damaged, or of another version"):
        run.read_summary()


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.summary_path.mkdir()
    run.metrics_path.mkdir()
    for read in (run.read_summary, run.read_metrics):
        with pytest.raises(InputError, match=r"(summary.json|metrics.jsonl) cannot be read: Is a directory"):
            read()
    assert (run.summary, run.metrics()) == ({}, [])
