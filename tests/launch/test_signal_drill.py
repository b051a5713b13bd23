"""Requests to stop under every launcher, sent to whoever may get them, for `make drills`."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shardstep.trainer.checkpoints import checkpoint_files
from tests.distributed import HANG_S
from tests.launch.test_launch import BIN, FORMS, TRAIN
from tests.runs import read_lines, train_lines, write_recipe
from tests.trainer.test_train import read_wandb

ENDLESS: dict[str, Any] = {
    "data": {"mode": "stream", "workers": 2},
    "train": {"global_batch_size": 8, "duration": "1000000 steps", "device": "cpu"},
    "checkpoint": {"every": "100000 steps"},
    "eval": {"every": "100000 steps"},
    "log": {"every": "20 steps", "wandb": "offline"},
}


def children_of(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def ranks_of(agent: int) -> list[int]:
    return [
        number
        for number in children_of(agent)
        if "train.py" in Path(f"/proc/{number}/cmdline").read_text(errors="replace")
    ]


def start(form: str, recipe: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, and wait until it trains."""
    lines = folder / "run" / "metrics.jsonl"
    before = lines.stat().st_size if lines.exists() else 0
    process = subprocess.Popen(
        [*FORMS[form], str(recipe), *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + HANG_S
    while not (lines.exists() and lines.stat().st_size > before + 300):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it does not begin to train"
        time.sleep(0.1)
    return process


def wait_for_all(process: subprocess.Popen[str], ranks: list[int]) -> str:
    output, _ = process.communicate(timeout=HANG_S)
    deadline = time.monotonic() + HANG_S
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank is left over"
        time.sleep(0.1)
    return output


CASES = [
    ("python", "SIGTERM", "agent", 85),
    ("python", "SIGUSR1", "agent", 85),
    ("python", "SIGINT", "agent", 85),
    ("python", "SIGTERM", "everyone", 85),  # wandb's service with it
    ("torchrun 2", "SIGTERM", "agent", 1),  # the agent calls every end by a signal a failure
    ("torchrun 2", "SIGTERM", "one rank", 0),
    ("torchrun 2", "SIGUSR1", "one rank", 0),
    ("torchrun 2", "SIGTERM", "everyone", 1),
    ("torchrun 2", "SIGUSR1", "everyone", -signal.SIGUSR1),  # it kills the agent; the ranks see that and save
    ("accelerate 2", "SIGTERM", "agent", 1),
    ("accelerate 2", "SIGTERM", "one rank", 0),
    ("accelerate 2", "SIGTERM", "everyone", 1),
]


@pytest.mark.drill
@pytest.mark.parametrize(("form", "name", "target", "code"), CASES)
def test_a_signal_saves_the_step(form: str, name: str, target: str, code: int, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **ENDLESS)
    process, number = start(form, recipe, tmp_path), getattr(signal, name)
    ranks = ranks_of(process.pid)
    if target == "everyone":
        os.killpg(process.pid, number)
    else:
        os.kill(ranks[-1] if target == "one rank" else process.pid, number)
    output = wait_for_all(process, ranks)
    assert process.returncode == code, output

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "preempted", output
    (saved,) = checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint_files.step_of(saved) == summary["step"] > 0
    assert not checkpoint_files.problems_of(saved)

    more = summary["step"] + 20
    again = subprocess.run(
        [*FORMS[form], str(recipe), f"train.duration={more} steps", "run.allow_changes=[train.duration]"],
        cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    steps = [line["step"] for line in train_lines(tmp_path / "run")]
    assert steps == sorted(set(steps))
    assert steps[-1] == more
    history = [
        entry
        for piece in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        for entry in read_wandb(piece)[0]
    ]
    assert [entry["_step"] for entry in history if "train/loss" in entry] == steps


@pytest.mark.drill
def test_a_rank_that_dies_is_replaced(shards: Path, tmp_path: Path) -> None:
    """Under torchrun --max-restarts the run goes on from its last checkpoint, to the same end; with resume=never, too."""
    sections = {
        "run": {"resume": "never"},
        "train": {"global_batch_size": 8, "duration": "2500 steps", "device": "cpu"},
        "checkpoint": {"every": "100 steps"},
        "eval": {"every": "100000 steps"},
        "log": {"every": "20 steps"},
    }
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "2", TRAIN]
    FORMS["torchrun restarts"] = command
    for name, kills in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        process = start("torchrun restarts", write_recipe(folder, shards, **sections), folder)
        if kills:
            while not list((folder / "run" / "checkpoints").glob("step-*")):
                time.sleep(0.02)
            os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, output
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert json.loads((killed / "summary.json").read_text())["restarts"] == 1
    first, second = ([line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (whole, killed))
    assert first == second


@pytest.mark.drill
@pytest.mark.parametrize("frozen", ["0", "1"])
def test_a_frozen_process_is_named(frozen: str, shards: Path, tmp_path: Path) -> None:
    """A stopped process has no threads that could tell of it: the other one does."""
    recipe = write_recipe(tmp_path, shards, **ENDLESS)
    process = start("torchrun 2", recipe, tmp_path, "run.hang_timeout=8", "log.wandb=disabled")
    (rank,) = (
        number
        for number in ranks_of(process.pid)
        if f"\0RANK={frozen}\0" in Path(f"/proc/{number}/environ").read_text()
    )
    os.kill(rank, signal.SIGSTOP)
    output, _ = process.communicate(timeout=HANG_S)  # the agent kills it after 30 s
    assert process.returncode == 1
    assert f"failed: rank {frozen} has not moved for" in output
    assert output.count("has not moved for") == 1


@pytest.mark.drill
def test_damage_to_the_shards_while_training_is_named(shards: Path, tmp_path: Path) -> None:
    """A shard that changes under a streaming run ends it with the sample's name; the run can be resumed when it is mended."""
    import shutil

    shutil.copytree(shards, tmp_path / "shards")
    recipe = write_recipe(tmp_path, tmp_path / "shards", **ENDLESS | {"checkpoint": {"every": "50 steps"}})
    process = start("torchrun 2", recipe, tmp_path)
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    victim = sorted((tmp_path / "shards" / "train").glob("*.tar"))[2]
    content = victim.read_bytes()
    changed = bytearray(content)
    for place in range(512, len(changed), 700):
        changed[place] ^= 0xFF
    with victim.open("r+b") as file:  # in place: the run has it open
        file.write(changed)
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 1
    assert victim.name in output
    assert 'launch/train.py", line' not in output  # a traceback of ours
    victim.write_bytes(content)
    newest, passed_over = checkpoint_files.newest_intact(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert not passed_over
