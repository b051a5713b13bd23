"""Ctrl-C while a run is starting: exit code 130, one line, no traceback, whatever is being imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import HANG_S, free_port
from tests.launch.test_launch import BIN, FORMS, TRAIN
from tests.runs import write_recipe

SITE = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        in_rank = "INTERRUPT_IN_RANK" in os.environ
        if name == os.environ.get("INTERRUPT_AT") and os.environ.get("RANK") == ("0" if in_rank else None):
            sys.meta_path.remove(self)
            try:
                os.kill(os.getppid() if in_rank else os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if "SWALLOW" not in os.environ:
                    raise ImportError("numpy's") if "RENAME" in os.environ else KeyboardInterrupt

sys.meta_path.insert(0, Interrupter())
"""  # Python imports it as it starts


@pytest.mark.parametrize(
    ("form", "module", "way"),
    [
        ("shardstep", "shardstep.launch.cli", ""),
        ("shardstep", "shardstep.launch.train", ""),
        ("python", "shardstep.launch.cli", ""),
        ("python", "omegaconf", ""),
        ("python", "torch", ""),
        ("python", "torch", "RENAME"),
        ("python", "accelerate", "SWALLOW"),
        ("python", "shardstep.trainer.setup", ""),
        ("nproc 2", "shardstep.launch.ranks", ""),
        ("nproc 2", "omegaconf", ""),  # in rank 0, before it has a handler: it sends the signal to its launcher
        ("nproc 2", "accelerate", ""),
    ],
)
def test_ctrl_c_while_starting(form: str, module: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module} | ({way: "1"} if way else {})
    if form == "nproc 2" and module != "shardstep.launch.ranks":
        environment["INTERRUPT_IN_RANK"] = "1"
    (tmp_path / "here").mkdir()
    command = [*FORMS[form], "smoke", "train.duration=1000000 steps"]
    result = subprocess.run(
        command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert result.returncode == 130, result.stdout + result.stderr
    # The other rank may have begun to write data by then.
    told = [line for line in result.stderr.splitlines() if not line.startswith(("writing ", "checking "))]
    assert told == ["interrupted"]
    assert not (tmp_path / "here" / "runs").exists()


def test_ctrl_c_while_waiting_for_a_rank(shards: Path, tmp_path: Path) -> None:
    recipe, port = write_recipe(tmp_path, shards), free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, TRAIN, str(recipe)],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    listening, deadline = f":{port:04X} ", time.monotonic() + HANG_S
    while not any(listening in Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert stderr == "interrupted\n"


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 85, "stopped by SIGTERM, while waiting for the other ranks\n"),
    ],
)
def test_a_signal_while_a_world_comes_up_is_one_line(
    number: signal.Signals, code: int, told: str, shards: Path, tmp_path: Path
) -> None:
    """Of three ranks one never comes. torch (2.15) printed stacks: of a rank that was early, and of one that was left."""
    recipe, port = write_recipe(tmp_path, shards), free_port()
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {}
    for rank in (1, 0):  # rank 1 comes before there is a port
        command, environment = [sys.executable, TRAIN, str(recipe)], os.environ | place | {"RANK": str(rank)}
        ranks[rank] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        if rank == 1:
            stderr = ranks[1].stderr
            assert stderr is not None
            assert stderr.readline() == f"rank 1 waits for rank 0, or the launcher, to listen at 127.0.0.1:{port}\n"
    for rank, process in ranks.items():
        assert process.stderr is not None
        assert process.stderr.readline() == f"rank {rank} waits for the others to come to 127.0.0.1:{port}\n"
    for rank in (0, 1):
        ranks[rank].send_signal(number)
    ends = {rank: (process.communicate(timeout=HANG_S)[1], process.returncode) for rank, process in ranks.items()}
    assert ends[0] == (told, code)
    assert ends[1] == ("" if number == signal.SIGINT else told, code)  # only rank 0 prints that it is interrupted


def test_ctrl_c_in_a_rank_of_torchrun_is_one_line(tmp_path: Path) -> None:
    """torchrun itself prints a traceback; the ranks do not."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "INTERRUPT_AT": "accelerate", "INTERRUPT_IN_RANK": "1"}
    result = subprocess.run(
        [str(BIN / "torchrun"), "--nproc-per-node", "2", TRAIN, "smoke"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert result.returncode != 0
    assert "launch/train.py" not in result.stderr.partition("Traceback")[2], result.stderr
