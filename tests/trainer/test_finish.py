"""How a run ends: the kind of a failure, and who stopped a run."""

import signal
from pathlib import Path

import pytest
import torch

from shardstep.configs.errors import InputError, NonFiniteError
from shardstep.configs.load import load_recipe
from shardstep.trainer.finish import failure_of
from shardstep.trainer.resume import with_earlier_choices
from shardstep.trainer.run_dir import Failure
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit
from tests.trainer.test_run_before_rooms import FIXTURE


def allocation_error() -> Exception:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte was allocated")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (NonFiniteError("the loss is NaN"), "nonfinite"),
        (InputError("a shard is damaged"), "input"),
        (MemoryError(), "memory"),
        (allocation_error(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "lost_rank"),
        (RuntimeError("shapes do not match"), "error"),
        (KeyboardInterrupt(), "error"),
    ],
)
def test_failures_by_kind(error: BaseException, failure: Failure) -> None:
    assert failure_of(error) == failure


@pytest.mark.parametrize(("name", "interrupted"), [("SIGINT", True), ("SIGTERM", False)])
def test_an_interrupt_is_a_persons_stop(name: str, interrupted: bool, tmp_path: Path) -> None:
    stop_signal = StopSignal()
    stop_signal._note(signal.Signals[name], None)
    time_limit = TimeLimit(None, lambda: None, lambda: 0.0)
    requests = StopRequests(stop_signal, tmp_path, True, lambda numbers: numbers, time_limit)
    assert requests.check()
    assert (requests.interrupted, requests.by_person) == (interrupted, False)


def test_a_method_that_was_asked_for_is_not_replaced_on_resume() -> None:
    overrides = [f"run.dir={FIXTURE / 'stopped'}", "train.precision=auto"]
    asked = load_recipe(str(FIXTURE / "recipe.yaml"), [*overrides, "train.convolutions=unfold"]).recipe
    found = with_earlier_choices(asked).train
    assert (found.precision, found.convolutions) == ("fp32", "unfold")  # find_resume refuses it: the run had direct
    left_open = load_recipe(str(FIXTURE / "recipe.yaml"), overrides).recipe
    assert with_earlier_choices(left_open).train.convolutions == "direct"
