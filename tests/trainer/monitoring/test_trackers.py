"""Trackers: what they store, read back with their own readers; and that none of them can hurt a run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardstep.configs.load import load_recipe
from shardstep.trainer.monitoring import trackers as module
from shardstep.trainer.monitoring.trackers import Trackers
from shardstep.trainer.monitoring.wandb_tracker import WandbTracker, read_records, sync_note
from tests.distributed import HANG_S, run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, train_until, write_recipe
from tests.trainer.monitoring.test_display import slowly
from tests.trainer.test_train import read_wandb

# --- any tracker ------------------------------------------------------------------------------------------------------


class Recorder:
    """A tracker that notes what it is told, and does with it what a test wants."""

    name = "recorder"
    sends_files = False

    def __init__(self, on_log: Callable[[dict], None] = lambda line: None):
        self.lines: list[dict] = []
        self.finished: list[bool] = []
        self._on_log = on_log

    def start(self) -> None:
        pass

    def catch_up(self) -> None:
        pass

    def log(self, line: dict) -> None:
        self._on_log(line)
        self.lines.append(line)

    def saved(self, path: Path) -> None:
        pass

    def finish(self, summary: dict, failed: bool) -> None:
        self.finished.append(failed)

    def note(self) -> str:
        return "look here"


def start(
    recorders: list[Recorder],
    warnings: list[str],
    told: list[str] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trackers:
    return Trackers([*recorders], warnings.append, [].append if told is None else told.append, stop_requested)


def test_lines_come_in_order_and_all_before_the_end() -> None:
    recorder, warnings = Recorder(lambda line: time.sleep(0.001)), []
    trackers = start([recorder], warnings)
    for step in range(100):
        trackers.log({"step": step})
    assert trackers.finish({"status": "finished"}, failed=True) == ["look here"]
    assert [line["step"] for line in recorder.lines] == list(range(100))
    assert (recorder.finished, warnings) == ([True], [])


def test_a_tracker_that_blocks_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FINISH_S", 0.5)
    released = threading.Event()
    stuck, other, warnings = Recorder(lambda line: released.wait(60)), Recorder(), []
    trackers = start([stuck, other], warnings)
    began = time.monotonic()
    for step in range(100):
        trackers.log({"step": step})
    trackers.finish({"status": "finished"})
    assert time.monotonic() - began < 20  # the one that is stuck blocks for longer
    assert len(other.lines) == 100
    assert len(warnings) == 1
    assert "recorder has not finished" in warnings[0]
    released.set()


def test_a_finished_run_has_time_to_send_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FINISH_S", 0.2)
    sender, warnings, told = Recorder(), [], []
    sender.sends_files = True
    sender.finish = lambda summary, failed: time.sleep(1.5)  # type: ignore[method-assign, assignment]
    start([sender], warnings, told).finish({"status": "finished"})
    assert warnings == []
    assert told == ["sending files to recorder; Ctrl-C ends it"]
    # those of another run are not waited for, nor are they without an end
    start([sender], warnings, told).finish({"status": "failed"}, failed=True)
    monkeypatch.setattr(module, "_SEND_AT_MOST_S", 0.7)
    start([sender], warnings, told).finish({"status": "finished"})
    assert ["recorder has not finished after" in warning for warning in warnings] == [True, True]
    assert len(told) == 2


@pytest.mark.parametrize(
    ("mode", "artifacts", "sends"),
    [
        ("online", "weights", True),
        ("online", "checkpoints", True),
        ("online", "none", False),
        ("offline", "weights", False),
    ],
)
def test_wandb_sends_files_if_it_is_asked_to(mode: str, artifacts: str, sends: bool, tmp_path: Path) -> None:
    recipe = load_recipe("digits", [f"log.wandb={mode}", f"log.wandb_artifacts={artifacts}"]).recipe
    assert WandbTracker(recipe, tmp_path, tmp_path / "metrics.jsonl", [], {}).sends_files == sends


def test_a_request_to_stop_ends_the_sending_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FINISH_S", 0.2)
    released, told, warnings = threading.Event(), [], []
    sender = Recorder()
    sender.sends_files = True
    sender.finish = lambda summary, failed: released.wait(60)  # type: ignore[method-assign, assignment]
    began = time.monotonic()
    start([sender], warnings, told, lambda: bool(told)).finish({"status": "finished"})  # Ctrl-C, once it is offered
    assert time.monotonic() - began < 20
    assert len(told) == len(warnings) == 1
    released.set()


def test_a_tracker_that_cannot_keep_up_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", 5)
    released = threading.Event()
    slow, warnings = Recorder(lambda line: released.wait(60)), []
    trackers = start([slow], warnings)
    for step in range(100):
        trackers.log({"step": step})
    assert len(warnings) == 1
    assert "no longer takes lines" in warnings[0]
    released.set()
    trackers.finish({"status": "finished"})
    assert len(slow.lines) <= 6


@pytest.mark.parametrize("place", ["start", "catch_up", "log", "finish"])
def test_a_tracker_that_raises_is_told_of_once(place: str) -> None:
    def fails(*_: Any) -> None:
        raise OSError("gone")

    recorder, warnings = Recorder(), []
    setattr(recorder, place, fails)
    trackers = start([recorder], warnings)
    for step in range(5):
        trackers.log({"step": step})
    trackers.finish({"status": "finished"})
    assert warnings == ["recorder failed (gone), and gets no more lines; metrics.jsonl has everything"]


def test_a_tracker_that_does_not_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_START_S", 0.2)
    released = threading.Event()
    recorder, warnings = Recorder(), []
    recorder.start = lambda: released.wait(60)  # type: ignore[method-assign, assignment]
    trackers = start([recorder], warnings)
    trackers.log({"step": 0})
    trackers.finish({"status": "finished"})
    assert len(warnings) == 1
    assert "has not started" in warnings[0]
    released.set()


def test_training_goes_on_beside_a_wandb_that_hangs(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, log={"wandb": "offline"})
    ((code, out, message),) = run_ranks(1, with_hanging_wandb, str(recipe))
    assert code == 0
    assert message.count("wandb has not finished") == 1
    assert "done: test accuracy" in out
    assert len(train_lines(tmp_path / "run")) == 8


def with_hanging_wandb(recipe: str) -> tuple[int, str, str]:
    """Runs in a rank: wandb takes its second line and never comes back."""
    import wandb

    module._FINISH_S = 1.0
    original, calls = wandb.init, []

    def init(**options: Any) -> Any:
        run = original(**options)

        def log(*_: object, **__: object) -> None:
            calls.append(1)
            if len(calls) > 1:
                threading.Event().wait(3600)

        run.log = log
        return run

    wandb.init = init
    return failure_of(recipe)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def assert_events_are_those_of_the_lines(folder: Path) -> Any:
    events, lines = read_events(folder), read_lines(folder / "metrics.jsonl")
    for kind, key in (("train", "loss"), ("train", "lr"), ("eval", "accuracy")):
        expected = [(line["step"], line[key]) for line in lines if line["kind"] == kind]
        found = scalars(events, f"{kind}/{key}")
        assert [step for step, _ in found] == [step for step, _ in expected], (kind, key)
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    return events


def test_tensorboard_holds_what_was_logged(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, log={"tensorboard": True})
    ((code, out, _), _) = run_ranks(2, failure_of, str(recipe), pictures=True)
    assert code == 0
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in out
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # of rank 0
    events = assert_events_are_those_of_the_lines(tmp_path / "run")
    assert not [name for name in events.Tags()["scalars"] if name.split("/")[1] in ("step", "time", "left_s")]
    assert sorted(events.Tags()["images"]) == ["pictures/confusion", "pictures/curves", "pictures/predictions"]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "hidden:" in config
    facts = events.Tensors("facts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "ranks: 2" in facts
    assert "torch:" in facts


def test_tensorboard_has_no_step_twice_after_a_restart(shards: Path, tmp_path: Path) -> None:
    """Broken off in step 8, where the last checkpoint is of step 6: events of step 7 may be there already, or not."""
    sections: dict[str, Any] = {
        "train": {"duration": "11 steps"},
        "eval": {"every": "5 steps"},
        "checkpoint": {"every": "3 steps"},
        "log": {"every": "1 steps", "tensorboard": True},
    }
    recipe = write_recipe(tmp_path, shards, **sections)
    run_ranks(1, train_until, str(recipe), 7)
    (before,) = (tmp_path / "run" / "tensorboard").iterdir()
    train_ranks(1, recipe)
    assert not before.exists()
    events = assert_events_are_those_of_the_lines(tmp_path / "run")
    assert [step for step, _ in scalars(events, "train/loss")] == list(range(1, 12))


def test_tensorboard_that_is_missing_is_told_at_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    recipe = write_recipe(tmp_path, shards, log={"tensorboard": True})
    code, _, message = failure_of(str(recipe), "log.wandb_artifacts=weights")
    assert code == 2
    assert "pip install 'shardstep[tensorboard]'" in message
    assert "log.wandb_artifacts=weights has no effect with log.wandb=disabled" in message


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_wandb_holds_code_hardware_pictures_and_files(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True)
    sections: dict[str, Any] = {
        "checkpoint": {"every": "4 steps"},
        "log": {"wandb": "offline", "wandb_artifacts": "checkpoints"},
    }
    recipe = write_recipe(tmp_path, shards, **sections)
    ((code, out, _),) = run_ranks(1, in_folder, str(repository), str(recipe), pictures=True)
    assert code == 0

    (piece,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    history, config, _ = read_wandb(piece)
    assert config["commit"] == head.stdout[:12]
    assert config["versions"]["shardstep"]
    assert config["hardware"]["ranks"] == 1
    assert config["optimizer"]["lr"] == 0.05
    pictures = [entry for entry in history if any(name.startswith("pictures/confusion") for name in entry)]
    assert len(pictures) == 1
    assert len(list((piece.parent / "files" / "media" / "images" / "pictures").glob("*.png"))) == 3
    files = artifacts(piece)
    assert [name for name, _ in files] == ["recipe-checkpoint", "recipe-checkpoint", "recipe-model"]
    assert {"model.safetensors", "optimizer.pt", "manifest.json"} <= files[0][1]
    assert files[2][1] == {"model.safetensors", "config.yaml"}
    staged = list((tmp_path / "run" / "wandb" / "artifacts").rglob("*"))
    assert len([path for path in staged if path.is_file()]) >= 3  # they stay with the run until they are sent

    assert f"wandb sync {piece.parent}" in out  # told at the end
    piece.with_name(f"{piece.name}.synced").touch()  # as wandb does
    assert sync_note(tmp_path / "run") == ""


def test_no_temporary_folder_is_left(shards: Path, tmp_path: Path) -> None:
    """Of wandb's, which a process that ends at once would leave."""
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps"}, log={"wandb": "offline"})
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-m", "shardstep.launch.train", str(recipe)]
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(place)}, capture_output=True)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert list(place.iterdir()) == []


def in_folder(folder: str, recipe: str) -> tuple[int, str, str]:
    """Runs in a rank, whose working folder is a repository."""
    os.chdir(folder)
    return failure_of(recipe)


def artifacts(piece: Path) -> list[tuple[str, set[str]]]:
    """Name and files of each artifact that an offline file holds."""
    found = []
    for record in read_records(piece):
        request = record.get("request", {}).get("log_artifact", {}).get("artifact", {})
        if artifact := record.get("artifact") or request:
            manifest = artifact["manifest"]
            contents = {entry["path"] for entry in manifest.get("contents", [])}
            if "manifest_file_path" in manifest:
                contents |= set(json.loads(Path(manifest["manifest_file_path"]).read_text()))
            found.append((artifact["name"], contents))
    return found


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_run_outlives_the_service_of_wandb(name: str, shards: Path, tmp_path: Path) -> None:
    """Killed, it takes nothing more; frozen, it never answers again."""
    recipe = write_recipe(tmp_path, shards, log={"wandb": "offline"})
    script = slowly(tmp_path)
    script.write_text(
        "from shardstep.trainer.monitoring import trackers\ntrackers._FINISH_S = 2.0\n" + script.read_text()
    )
    with (tmp_path / "output").open("w") as file:  # no pipe: the service would hold it open
        process = subprocess.Popen([sys.executable, str(script), str(recipe)], stdout=file, stderr=file)
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.is_file() and len(read_lines(lines)) > 2):
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.05)
    services = [child for child in psutil.Process(process.pid).children(recursive=True) if "wandb" in child.name()]
    assert services
    for service in services:
        service.send_signal(getattr(signal, name))
    try:
        process.wait(HANG_S)
    finally:
        process.kill()
        for service in filter(psutil.Process.is_running, services):
            service.kill()
    output = (tmp_path / "output").read_text()
    assert process.returncode == 0, output
    assert len(train_lines(tmp_path / "run")) == 8
    assert output.count("warning: wandb") == 1
    assert "metrics.jsonl has everything" in output
    assert "done: test accuracy" in output
