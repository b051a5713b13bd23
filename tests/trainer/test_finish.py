"""How a run ends: the kind of a failure, and who stopped a run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardstep.configs.errors import InputError, NonFiniteError
from shardstep.configs.load import load_recipe
from shardstep.trainer import finish
from shardstep.trainer.resume import with_earlier_choices
from shardstep.trainer.run_dir import Failure
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit
from tests.distributed import run_ranks
from tests.runs import failure_of, write_recipe
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
    assert finish.failure_of(error) == failure


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


def finish_with(error: type[Exception], place: str, recipe: str) -> tuple[int, str, str]:
    """Runs in a rank: trains, and a function that only a finished run calls raises."""
    from importlib import import_module

    def fail(*_: object, **__: object) -> None:
        raise error("first line\nmore")

    module, *owner, name = place.split(":")
    target = import_module(f"shardstep.trainer.{module}")
    setattr(getattr(target, owner[0]) if owner else target, name, fail)
    return failure_of(recipe)


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        ("monitoring.pictures:draw_curves", ValueError, "curves.png (first line)"),
        ("monitoring.pictures:draw_confusion", RuntimeError, "confusion.png (first line)"),
        ("monitoring.pictures:draw_predictions", MemoryError, "predictions.png (first line)"),
        ("monitoring.pictures:pyplot", ImportError, "curves.png (first line), confusion.png"),
        ("finish:first_predictions", InputError, "predictions.png (first line)"),
        ("monitoring.tensorboard_tracker:pictures_of", ValueError, "TensorBoard failed (first line"),
        ("monitoring.tensorboard_tracker:TensorBoardTracker:finish", OSError, "TensorBoard failed (first line"),
        ("monitoring.tensorboard_tracker:TensorBoardTracker:note", OSError, "TensorBoard failed (first line"),
    ],
)
def test_a_finished_run_stays_finished(
    place: str, error: type[Exception], told: str, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps"}, log={"tensorboard": True})
    ((code, out, err),) = run_ranks(1, finish_with, error, place, str(recipe), pictures=True)
    assert code == 0, err
    assert err.count("warning: ") == 1
    assert told in err
    assert "done: test accuracy" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_a_terminal_that_lacks_a_letter_gets_its_escape(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps"}, run={"dir": str(tmp_path / "caf\u00e9")})
    command = [sys.executable, "-m", "shardstep.launch.train", str(recipe)]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout
    assert json.loads((tmp_path / "caf\u00e9" / "summary.json").read_text())["status"] == "finished"
