"""The end of an allocation: the run saves in time, and begins no evaluation that cannot finish."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.launch_env import Allocation
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit, jobs_needed, jobs_text
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_ranks, write_recipe


class Fixture:
    """A TimeLimit of an hour whose clock, save time and progress a test sets."""

    def __init__(self, length_s: float = 3600.0):
        self.now, self.save_s, self.done = 0.0, None, 0.0
        self.limit = TimeLimit(Allocation(0, length_s), lambda: self.save_s, lambda: self.done, lambda: self.now)

    def is_near(self, at: float, evaluation_s: float = 0.0) -> bool:
        self.now = at
        return self.limit.is_near(evaluation_s)


def test_what_ending_well_needs() -> None:
    given = Fixture()
    # nothing measured: 1.5 x 2 x (0 + 5) + 20 = 35
    assert not given.is_near(3600 - 35)
    assert given.is_near(3600 - 34)
    given.save_s = 30.0
    given.limit.note_interval(4.0)
    # two steps of 4 s and two saves of 30 s, half as long again, and 20: 1.5 x 2 x (4 + 30) + 20 = 122
    assert not given.is_near(3600 - 122)
    assert given.is_near(3600 - 121)
    # an evaluation of 100 s more: 122 + 150 = 272
    assert not given.is_near(3600 - 272, 100.0)
    assert given.is_near(3600 - 271, 100.0)


def test_a_slow_look_long_ago_is_forgotten() -> None:
    given = Fixture()
    given.limit.note_interval(1000.0)
    assert given.is_near(3600 - 2000)
    for _ in range(30):
        given.limit.note_interval(1.0)
    assert not given.is_near(3600 - 2000)


def test_without_an_allocation_there_is_always_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(None, lambda: 1e9, lambda: 0.5)
    assert not limit.is_near(1e9)
    assert limit.outlook() is None
    assert limit.early_outlook() is None
    for environment in ({}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "Unknown"}):
        monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert launch_env.allocation() is None
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "4600")
    assert launch_env.allocation() == Allocation(1000.0, 4600.0)


def test_how_many_more_jobs() -> None:
    # 10 % in 600 s, 3000 s usable a job: 50 % a job; 90 % are left
    assert jobs_needed(done_before=0.0, done=0.1, elapsed_s=600, usable_s=3000) == 2
    # at the end of such a job 50 % are left, which is exactly one
    assert jobs_needed(done_before=0.0, done=0.5, elapsed_s=3000, usable_s=3000) == 1
    assert jobs_needed(done_before=0.2, done=1.0, elapsed_s=3000, usable_s=3000) == 0
    assert jobs_needed(done_before=0.2, done=0.2, elapsed_s=3000, usable_s=3000) is None
    assert jobs_text(1, 720) == "1 more job of 12 min"
    assert jobs_text(3, 4 * 3600 + 60) == "3 more jobs of 4 h 1 min"


def test_the_outlook_is_given_once_and_only_if_the_job_is_too_short() -> None:
    given = Fixture()
    given.now, given.done = 59.0, 0.001
    assert given.limit.early_outlook() is None
    given.now = 90.0  # 0.1 % in 90 s: a job of 3565 usable s does 3.96 %; 99.9 / 3.96 = 25.2
    assert given.limit.early_outlook() == "0% of the run is done; at this pace the rest takes 26 more jobs of 1 h 0 min"
    assert given.limit.early_outlook() is None
    quick = Fixture()
    quick.now, quick.done = 90.0, 0.5
    assert quick.limit.early_outlook() is None
    stuck = Fixture()
    stuck.now = 90.0
    assert "none of it in this job" in str(stuck.limit.early_outlook())


def test_rank_0_asks_for_all(tmp_path: Path) -> None:
    given = Fixture()
    given.now = 3590.0
    requests = StopRequests(StopSignal(), tmp_path, is_main=True, agree=lambda numbers: numbers, time_limit=given.limit)
    assert requests.check()
    assert requests.reason == "the allocation's end"
    assert not requests.by_person
    other = StopRequests(StopSignal(), tmp_path, is_main=False, agree=lambda numbers: numbers, time_limit=given.limit)
    assert not other.check()


SECTIONS: dict[str, Any] = {
    "train": {"duration": "12 steps"},
    "eval": {"every": "5 steps", "batch_size": 10},
    "checkpoint": {"every": "100 steps"},
}


def in_an_allocation(
    recipe: str, seconds: float, evaluation_s: float, stopped_file: str, trained_s: float = 0.0, *overrides: str
) -> tuple[int, str, str]:
    """Runs in a rank: train in an allocation that ends in `seconds`; an evaluation, and training, took so long before."""
    from shardstep.trainer.state import TrainState

    os.environ["SLURM_JOB_END_TIME"] = str(time.time() + seconds)
    os.environ["SHARDSTEP_STOPPED_FILE"] = stopped_file
    begin = TrainState.__init__

    def with_evaluation(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.evaluation_s, self.wall_s = evaluation_s, trained_s

    TrainState.__init__ = with_evaluation  # type: ignore[method-assign]
    return failure_of(recipe, *overrides)


def test_no_evaluation_is_begun_that_cannot_finish(shards: Path, tmp_path: Path) -> None:
    recipe, stopped = write_recipe(tmp_path, shards, **SECTIONS), tmp_path / "stopped"
    # 1000 s are plenty for steps, but not for an evaluation of 900 s, half as long again: the first is due at step 5
    outcomes = run_ranks(2, in_an_allocation, str(recipe), 1000.0, 900.0, str(stopped))
    assert [code for code, _, _ in outcomes] == [85, 85]
    assert "stopped by the allocation's end: step 5 is saved" in outcomes[0][1]
    assert "the allocation ends in 17 min" in outcomes[0][1]
    assert "42% of the run is done; at this pace the rest takes 1 more job" in outcomes[0][1]  # 5 of 12 steps
    assert stopped.read_text() == "5 signal\n"
    path = tmp_path / "run" / "checkpoints" / "step-00000005" / "state.json"
    assert json.loads(path.read_text())["evaluation_s"] >= 900.0  # the next start knows it, too
    assert not [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    train_ranks(2, recipe)  # where there is time, it goes on with that evaluation
    evaluations = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert evaluations == [5, 10, 12]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_a_run_that_its_time_ends_is_done_by_its_time(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, **SECTIONS))
    limits = ["train.duration=1000000 epochs", "train.max_wall_s=1000"]
    stopped = str(tmp_path / "stopped")
    ((code, output, _),) = run_ranks(1, in_an_allocation, recipe, 1000.0, 900.0, stopped, 500.0, *limits)
    assert code == 85
    assert "50% of the run is done; at this pace the rest takes" in output  # 500 s of 1000, and a moment
    assert "a job of this length may be too short" not in output


def test_the_job_script_learns_that_a_person_stopped_the_run(shards: Path, tmp_path: Path) -> None:
    recipe, stopped = (
        write_recipe(tmp_path, shards, **SECTIONS, run={"dir": str(tmp_path / "run")}),
        tmp_path / "stopped",
    )
    train_ranks(1, recipe, "train.duration=2 steps")
    (tmp_path / "run" / "STOP").touch()
    duration = "run.allow_changes=[train.duration]"
    ((code, output, _),) = run_ranks(1, stopped_by_file, str(recipe), str(stopped), duration)
    assert code == 85, output
    assert stopped.read_text() == "0 person\n"


def stopped_by_file(recipe: str, stopped_file: str, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank."""
    os.environ["SHARDSTEP_STOPPED_FILE"] = stopped_file
    return failure_of(recipe, *overrides)
