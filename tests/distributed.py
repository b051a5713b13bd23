"""Run a function on N real gloo processes, or a program under mpirun.

The processes are forked from a server that has imported torch and started no threads, so that one costs a fraction of a
second and none inherits a half-locked thread pool.
"""

import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardstep.launch.ranks import free_port

context = multiprocessing.get_context("forkserver")
HANG_S = 900
"""Seconds after which ranks and commands count as hanging: many times what any of them takes on a busy machine."""

# A name that cannot be imported is skipped silently: tests/test_layout.py checks these.
PRELOAD = [
    "accelerate",
    "cv2",
    "matplotlib.pyplot",
    "pytest",
    "shardstep.launch.train",
    "shardstep.trainer.description",
    "shardstep.trainer.finish",
    "shardstep.trainer.resume",
    "shardstep.trainer.setup",
    "shardstep.trainer.validate_recipe",
]
context.set_forkserver_preload(PRELOAD)


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = HANG_S, pictures: bool = False
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new world; returns what each rank returned, by rank.

    Args:
        timeout_s: until the ranks count as hanging.
        pictures: draw the pictures of a finished run; they take longer than a small run's training.

    Raises:
        AssertionError: a rank raised or did not end in time; the message has the first traceback.
    """
    port, results = free_port(), context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, world_size, port, pictures, function, arguments, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < world_size:
            try:
                rank, succeeded, value = results.get(timeout=1)
            except queue.Empty:
                codes = [process.exitcode for process in processes]
                assert not any(codes), f"ranks of {world_size} died without a word, exit codes {codes}"
                assert time.monotonic() < deadline, (
                    f"only ranks {sorted(outcomes)} of {world_size} ended in {timeout_s} s"
                )
                continue
            assert succeeded, f"rank {rank} of {world_size} failed:\n{value}"
            outcomes[rank] = value
    finally:
        for process in processes:
            process.join(timeout=HANG_S if len(outcomes) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [outcomes[rank] for rank in range(world_size)]


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `shardstep ...` in a process forked from the server, which has imported torch: seconds less than the script."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = context.Process(target=_run_command, args=(["shardstep", *words], str(cwd), outputs))
        process.start()
        process.join(HANG_S)
        if process.is_alive():
            process.kill()
        process.join()
        stdout, stderr = (Path(path).read_text() for path in outputs)
    return subprocess.CompletedProcess(words, process.exitcode or 0, stdout, stderr)


def _run_command(words: list[str], folder: str, outputs: list[str]) -> None:
    from shardstep.launch.cli import main

    os.chdir(folder)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    sys.exit(main())


def join_world(rank: int, world_size: int, port: int) -> None:
    """Make this process look like one that a launcher started."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",  # Accelerate warns where it is unset
    )
    if "PYTHONWARNINGS" not in os.environ:
        warnings.simplefilter("error")  # pytest's own filter does not reach here
    # wandb's own use of pydantic is not ours to mend
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="wandb|pydantic")


def _run_rank(
    rank: int, world_size: int, port: int, pictures: bool, function: Callable, arguments: tuple, results: Any
) -> None:
    import torch.distributed as dist

    from shardstep.trainer import finish

    join_world(rank, world_size, port)
    if not pictures:
        finish.draw_pictures = lambda run, evaluation: []
    try:
        results.put((rank, True, function(*arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def mpi(name: str) -> list[str]:
    """The launcher of an MPI; the test is skipped where there is none."""
    program, package = {"open mpi": ("mpirun.openmpi", "openmpi-bin"), "mpich": ("mpirun.mpich", "mpich")}[name]
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed (apt-get install {package})")
    as_root = ["--allow-run-as-root"] if name == "open mpi" and os.geteuid() == 0 else []
    return [program, *as_root, *(["--oversubscribe"] if name == "open mpi" else [])]


BOTH_MPIS = pytest.mark.parametrize("name", ["open mpi", "mpich"])
