"""Where the time of a run goes, and that to look costs next to nothing."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardstep.trainer.monitoring.timing import Timer, time_table
from tests.runs import train_ranks, write_recipe

SLOW_S = 0.02


def test_every_second_is_given_to_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])  # made, started, then marks
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    timer = Timer("cpu")
    timer.start()
    timer.begin_step()  # 1 to 3: the rest
    timer.mark("data")  # 3 to 6
    timer.mark("backward")  # 6 to 10
    timer.mark("evaluation")  # 10 to 15
    # of 3 s of data, 1 s handed over and 0.5 s augmented; each backward pass waited 1.5 s for others
    time_s = timer.time_s(to_device_s=1.0, augment_s=0.5, exposed_s=1.5)
    assert time_s == {
        "total": 14.0, "data_wait": 1.5, "to_device": 1.0, "augment": 0.5, "forward": 0.0, "backward": 2.5,
        "communication": 1.5, "optimizer": 0.0, "evaluation": 5.0, "checkpoint": 0.0, "other": 2.0,
    }  # fmt: skip
    assert time_table(time_s)[1] == "  waiting for data        1.5 s  10.7%"
    assert not [row for row in time_table(time_s) if "optimizer" in row]


def test_a_mark_reads_the_clock_once_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append("clock") or clock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("synchronize"))
    timer = Timer("cpu")
    calls.clear()
    timer.mark("forward")
    assert calls == ["clock"]


class FakeEvent:
    """A device's event, 1 ms after the one before; it has passed when it has been asked `patience` times."""

    count, patience = 0, 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        FakeEvent.count += 1
        self.moment_ms, self.asked = FakeEvent.count, 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > FakeEvent.patience

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.moment_ms - self.moment_ms


@pytest.mark.parametrize(("patience", "samples"), [(0, 3), (40, 3), (70, 2), (1000, 1)])
def test_a_gpu_is_asked_at_some_steps_only(monkeypatch: pytest.MonkeyPatch, patience: int, samples: int) -> None:
    """However far it lags behind the host, nobody waits for it."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.count, FakeEvent.patience = 0, patience
    timer = Timer("cuda")
    for _ in range(112):
        timer.begin_step()
        for activity in ("data", "forward", "backward", "optimizer"):
            timer.mark(activity)  # type: ignore[arg-type]
    # steps 10, 60 and 110, unless an earlier one is not over: at the begin, four marks, and one before the next step
    assert FakeEvent.count == samples * 6
    timer.seconds["other"] += 10.0  # the host's clock must have room for what the events say
    # 1 ms for every activity in each of the samples that are read, and 112 steps
    assert timer.time_s(0, 0, None)["backward"] == pytest.approx(0.112 if patience < 1000 else 0, abs=2e-3)


def test_what_a_gpu_does_once_stands_for_no_other_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.count, FakeEvent.patience = 0, 0
    timer = Timer("cuda")
    for step in range(100):
        timer.begin_step()
        FakeEvent.count += 1000 if step == 0 else 0  # ms that the device spends on kernels and plans
        timer.mark("forward")
    timer.begin_step()
    timer.seconds["other"] += 10.0
    assert timer.time_s(0, 0, None)["forward"] == pytest.approx(0.101, abs=2e-3)  # 101 steps of 1 ms


def test_a_gpu_has_no_more_time_than_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.count, FakeEvent.patience = 0, 0
    timer = Timer("cuda")
    for _ in range(20):
        timer.begin_step()
        timer.mark("data")
        timer.mark("forward")
        FakeEvent.count += 2  # the backward pass takes 3 ms, the others 1 ms
        timer.mark("backward")
        timer.mark("optimizer")
    timer.begin_step()
    timer.seconds = dict.fromkeys(timer.seconds, 0.0) | {
        "data": 0.02,
        "forward": 0.02,
        "evaluation": 0.01,
        "other": 0.02,
    }
    # 21 steps of 1 + 3 + 1 ms are 105 ms, and 70 - 20 - 10 = 40 ms are there: 8, 24 and 8
    time_s = timer.time_s(0, 0, None)
    assert [time_s[name] for name in ("forward", "backward", "optimizer", "other")] == [0.008, 0.024, 0.008, 0]
    assert time_s["total"] == pytest.approx(sum(value for name, value in time_s.items() if name != "total"))


def test_a_slow_part_shows_where_it_is(shards: Path, tmp_path: Path) -> None:
    from tests.distributed import run_ranks

    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "100 steps"})
    (time_s,) = run_ranks(1, with_slow_parts, str(recipe))
    # 6 steps of two micro-steps and 2 (of 11 samples) of one: each reads and goes forward once; one optimizer step
    assert time_s["data_wait"] >= 14 * SLOW_S
    assert time_s["forward"] >= 14 * 2 * SLOW_S
    assert time_s["optimizer"] >= 8 * 3 * SLOW_S
    assert time_s["evaluation"] >= 2 * SLOW_S
    assert time_s["total"] == pytest.approx(sum(value for name, value in time_s.items() if name != "total"), abs=0.01)
    assert time_s["communication"] == 0


def with_slow_parts(recipe: str) -> dict[str, float]:
    """Runs in a rank."""
    from shardstep.datasets.resident import ResidentReader
    from shardstep.launch.train import main
    from shardstep.trainer import loop
    from shardstep.trainer import run as run_module
    from shardstep.trainer.optim.losses import Objective

    def slower(owner: Any, name: str, by: int) -> None:
        function = getattr(owner, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(by * SLOW_S)
            return function(*arguments, **options)

        setattr(owner, name, slow)

    slower(ResidentReader, "read", 1)
    slower(Objective, "loss", 2)
    slower(loop, "step_optimizer", 3)
    slower(run_module, "evaluate", 1)
    assert main([recipe, "train.max_micro_batch=20"]) == 0
    return json.loads((Path(recipe).parent / "run" / "summary.json").read_text())["time_s"]


def test_ranks_tell_what_they_wait_for_each_other(shards: Path, tmp_path: Path) -> None:
    train_ranks(2, write_recipe(tmp_path, shards))
    time_s = json.loads((tmp_path / "run" / "summary.json").read_text())["time_s"]
    assert time_s["communication"] > 0
    assert time_s["communication"] + time_s["backward"] < time_s["total"]


def test_what_is_shared_while_gradients_are_computed_is_not_waited_for() -> None:
    from shardstep.trainer.distributed.ddp import exposed_communication_s

    assert exposed_communication_s(torch.nn.Linear(1, 1)) is None  # no DDP
    module = torch.nn.Linear(1, 1)
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    wrapped.__dict__.update(module.__dict__)
    times = {"world_size": 2, "avg_backward_comm_time": 5_000_000, "avg_backward_compute_comm_overlap_time": 3_000_000}
    wrapped.__dict__["_get_ddp_logging_data"] = lambda: times
    assert exposed_communication_s(SimpleNamespace(_orig_mod=wrapped)) == 0.002  # type: ignore[arg-type] # 5 ms, 3 of them at work
    times["world_size"] = 1
    assert exposed_communication_s(wrapped) is None
