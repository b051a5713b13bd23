"""train.max_wall_s: a run that ends after some seconds of training; and the gradient's norm in train lines."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shardstep.configs.durations import Duration, Progress
from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit
from shardstep.trainer.validate_recipe import validate_recipe
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

STEP_S, EVALUATION_S, LIMIT_S = 0.05, 0.7, 1.5


def slowly(recipe: str, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: each step takes STEP_S at least, each evaluation EVALUATION_S."""
    from shardstep.trainer import loop
    from shardstep.trainer import run as run_module

    step_function, evaluate_function = loop.train_step, run_module.evaluate

    def step(*arguments: Any) -> Any:
        time.sleep(STEP_S)
        return step_function(*arguments)

    def evaluate(*arguments: Any) -> Any:
        time.sleep(EVALUATION_S)
        return evaluate_function(*arguments)

    loop.train_step, run_module.evaluate = step, evaluate
    return failure_of(recipe, *overrides)


def test_training_ends_after_its_seconds_on_all_ranks(shards: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"eval": {"every": "10 steps"}, "checkpoint": {"every": "100000 steps"}}
    recipe = str(write_recipe(tmp_path, shards, **sections))
    limits = ["train.duration=100000 epochs", f"train.max_wall_s={LIMIT_S}"]
    assert [code for code, _, _ in run_ranks(2, slowly, recipe, *limits)] == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in lines[-2:]] == ["train", "eval"]  # as at the end of a duration
    assert lines[-1]["step"] == lines[-2]["step"] == summary["step"] > 1
    evaluations = sum(line["kind"] == "eval" for line in lines)
    # evaluations do not count; the last step began before the limit
    assert LIMIT_S <= summary["train_s"] < summary["wall_s"] - evaluations * EVALUATION_S * 0.99
    assert lines[-1]["train_s"] == pytest.approx(summary["train_s"], abs=1.0)
    assert {line["total_steps"] for line in lines} == {None}
    assert lines[-1]["share_done"] == 1.0
    shares = [line["share_done"] for line in lines]
    assert shares == sorted(shares)
    for line in train_lines(tmp_path / "run"):  # at most so many seconds of training, and an evaluation each 10 steps
        training_s = (1 - line["share_done"]) * LIMIT_S
        assert training_s - 0.1 <= line["left_s"] <= training_s + (1 + training_s / (10 * STEP_S)) * 5 * EVALUATION_S

    ((code, out, _),) = run_ranks(1, failure_of, recipe, *limits)
    assert code == 0
    assert "nothing to do" in out
    assert len(RunDir(tmp_path / "run").starts) == 1
    ((code, _, err),) = run_ranks(1, failure_of, recipe, limits[0], f"train.max_wall_s={2 * LIMIT_S}")
    assert code == 2  # it is a part of what the run is
    assert "train.max_wall_s: 1.5 -> 3.0" in err


def test_the_clock_is_looked_at_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 ms: checks come every half second, but the limit of 10.01 s is met by the very next step."""
    now, looks = [0.0], [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def agree(numbers: list[int]) -> list[int]:
        looks[0] += 1
        return numbers

    unlimited = TimeLimit(None, save_s=lambda: None, share_done=lambda: 0.0)
    requests = StopRequests(StopSignal(), tmp_path, True, agree, unlimited, max_train_s=10.01)
    while not requests.out_of_time:
        now[0] += 0.02
        requests.check(train_s=now[0])
    assert now[0] == pytest.approx(10.02)
    assert looks[0] < 40
    other = StopRequests(StopSignal(), tmp_path, False, lambda numbers: [0, 0, 1, 1], unlimited, max_train_s=10.01)
    other.check(train_s=0.1)  # rank 0's clock counts
    assert other.out_of_time
    assert not other.stop  # which is the run's end, and no request to go on later


def test_what_is_left_is_what_ends_the_run_first() -> None:
    endless = Plan(10, 100, 1, 1, Duration.parse("1000000 epochs"), max_train_s=80.0)
    progress, pace, every = Progress(step=20, epoch=2, position=0, samples=200), 25.0, Duration.parse("5 epochs")
    # 60 s of training are left, in which 60 x 25 = 1500 samples pass: an evaluation of 2 s at each 500
    assert endless.left_s(progress, 20.0, pace, every, 2.0) == 60 + 3 * 2
    assert endless.share_done(progress, 20.0) == 20 / 80
    assert endless.left_s(progress, 81.0, pace, every, 2.0) == 0
    assert endless.share_done(progress, 81.0) == 1.0
    assert endless.total_steps is None
    short = replace(endless, duration=Duration.parse("4 epochs"))
    # its duration is over before: 2 of 4 epochs are left, 200 samples in 8 s, and an evaluation
    assert short.left_s(progress, 20.0, pace, every, 2.0) == 8 + 2
    assert short.share_done(progress, 20.0) == 2 / 4
    assert replace(short, max_train_s=None).total_steps == short.duration_steps == 40


def test_a_schedule_that_needs_the_end_is_refused() -> None:
    for name in ("cosine", "linear", "one_cycle"):
        with pytest.raises(InputError, match=f"schedule.name={name} spans train.duration"):
            validate_recipe(load_recipe("digits", [f"schedule.name={name}", "train.max_wall_s=5"]))
    validate_recipe(load_recipe("digits", ["schedule.name=constant", "schedule.warmup=5 steps", "train.max_wall_s=5"]))
    with pytest.raises(InputError, match="train.max_wall_s=0.0 must be above 0"):
        validate_recipe(load_recipe("digits", ["schedule.name=constant", "train.max_wall_s=0"]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_train_lines_have_the_gradients_norm_before_clipping(world_size: int, shards: Path, tmp_path: Path) -> None:
    """SGD with lr 1 moves the weights by the gradient: the difference between two steps has the norm of the second's."""
    folders = []
    for steps in (1, 2):
        folders.append(tmp_path / str(steps))
        recipe = write_recipe(folders[-1], shards, optimizer={"name": "sgd", "lr": 1.0})
        train_ranks(world_size, recipe, f"train.duration={steps} steps", "log.grad_norm=true")
    one, two = (load_file(folder / "run" / "model.safetensors") for folder in folders)
    moved = sum(float((two[name] - one[name]).square().sum()) for name in one) ** 0.5
    norm = train_lines(folders[1] / "run")[1]["grad_norm"]
    assert norm == pytest.approx(moved, rel=1e-4)
    clipped = write_recipe(tmp_path / "clipped", shards, optimizer={"name": "sgd", "lr": 1.0}, log={"grad_norm": True})
    train_ranks(world_size, clipped, "train.duration=1 steps", f"train.clip_norm={norm / 1000}")
    assert train_lines(tmp_path / "clipped" / "run")[0]["grad_norm"] == train_lines(folders[0] / "run")[0]["grad_norm"]


def test_without_being_asked_for_there_is_no_norm(shards: Path, tmp_path: Path) -> None:
    train_ranks(1, write_recipe(tmp_path, shards), "train.duration=1 steps")
    assert "grad_norm" not in train_lines(tmp_path / "run")[0]
