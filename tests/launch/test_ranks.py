"""`shardstep train --nproc N`: ranks without torchrun or accelerate; and worlds of two agents on one machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S, free_port
from tests.launch.test_launch import BIN, TRAIN, start
from tests.runs import read_lines, train_lines, train_ranks, write_recipe

ENDLESS: dict[str, Any] = {
    "train": {"duration": "1000000 steps"},
    "checkpoint": {"every": "100000 steps"},
    "eval": {"every": "100000 steps"},
    "log": {"every": "20 steps"},
}
NPROC = [str(BIN / "shardstep"), "train", "--nproc", "2"]


def test_the_same_run_as_under_another_launcher(shards: Path, tmp_path: Path) -> None:
    result = start(*NPROC, str(write_recipe(tmp_path / "nproc", shards)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 ranks, cpu" in result.stdout
    assert result.stdout.count("done:") == 1
    train_ranks(2, write_recipe(tmp_path / "other", shards))
    one, other = (read_lines(tmp_path / name / "run" / "metrics.jsonl") for name in ("nproc", "other"))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.drill) for name in ("SIGINT", "SIGUSR1"))]
)
def test_a_signal_reaches_all_ranks(shards: Path, tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        [*NPROC, str(write_recipe(tmp_path, shards, **ENDLESS))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + HANG_S
    while not (lines.exists() and lines.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 85, output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "preempted"


def test_exit_codes() -> None:
    """The first rank that fails gives the exit code, whatever the others do; death by a signal is reported as a failure."""
    script = (
        "import os, sys, time; time.sleep(0.5 * int(os.environ['RANK'])); sys.exit([{0}, {1}][int(os.environ['RANK'])])"
    )
    run = "import sys; from shardstep.launch.ranks import *; sys.exit(start_ranks(2, [sys.executable, '-c', {!r}]))"
    for codes, expected in (((0, 0), 0), ((2, 0), 2), ((0, 3), 3), ((85, 85), 85), ((2, 1), 2)):
        result = subprocess.run(
            [sys.executable, "-c", run.format(script.format(*codes))], capture_output=True, text=True
        )
        assert result.returncode == expected, codes
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    result = subprocess.run([sys.executable, "-c", run.format(killed)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "failed: rank 0 was killed by SIGKILL\nfailed: rank 1 was killed by SIGKILL\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--nproc", "0"], {}, "error: --nproc=0 is not a number of ranks: give 1 or more"),
        (["--nproc", "2"], {"RANK": "0"}, "error: --nproc starts ranks itself: do not use it under torchrun"),
        (["--nproc", "2", "optimizer.lrr=1"], {}, "optimizer.lrr is not an option of adam; did you mean lr?"),
    ],
)
def test_bad_input_is_reported_once(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    command = [str(BIN / "shardstep"), "train", "smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment)
    assert result.returncode == 2
    assert result.stderr.count(message) == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_two_agents_make_one_world(shards: Path, tmp_path: Path) -> None:
    """Two machines without Slurm: torchrun on each, meeting by c10d; here both are this one."""
    recipe, port = write_recipe(tmp_path, shards), free_port()
    command = [
        str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair",
        "--rdzv-endpoint", f"localhost:{port}", TRAIN, str(recipe), "train.world_size=2",
    ]  # fmt: skip
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [agent.communicate(timeout=HANG_S)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
    assert "".join(outputs).count("done:") == 1
    train_ranks(2, write_recipe(tmp_path / "other", shards))  # with fewer threads, which add up in another order
    one, other = ([line["loss"] for line in train_lines(folder / "run")] for folder in (tmp_path, tmp_path / "other"))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "options", "ranks"),
    [("cpu", ["--num_cpu_threads_per_process", "1"], 1), ("cpu_ranks", ["--num_processes", "2"], 2),
     pytest.param("one_gpu", [], 1, marks=pytest.mark.drill),
     pytest.param("many_gpus", ["--num_processes", "2"], 2, marks=pytest.mark.drill)],
)  # fmt: skip
def test_configs_of_accelerate(config: str, options: list[str], ranks: int, shards: Path, tmp_path: Path) -> None:
    file = str(ROOT / "configs" / "accelerate" / f"{config}.yaml")
    recipe = write_recipe(tmp_path, shards, train={"duration": "3 steps", "device": "auto", "global_batch_size": 8})
    result = start(str(BIN / "accelerate"), "launch", "--config_file", file, *options, TRAIN, str(recipe), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == ranks
    assert "values were not passed" not in result.stderr  # Accelerate's warning about options it had to guess


@pytest.mark.drill
def test_config_of_accelerate_for_many_nodes(shards: Path, tmp_path: Path) -> None:
    recipe, port = write_recipe(tmp_path, shards, train={"duration": "3 steps", "global_batch_size": 8}), free_port()
    nodes = [
        subprocess.Popen(
            [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "configs" / "accelerate" / "many_nodes.yaml"),
             "--num_processes", "2", "--machine_rank", str(number), "--main_process_port", str(port), TRAIN, str(recipe)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=HANG_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_a_precision_given_to_accelerate_is_not_ignored_silently(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps", "global_batch_size": 8})
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    result = subprocess.run([sys.executable, TRAIN, str(recipe)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (
        "accelerate launch was given the precision bf16, which has no effect: train.precision decides" in result.stderr
    )
