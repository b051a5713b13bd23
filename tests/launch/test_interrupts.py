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
