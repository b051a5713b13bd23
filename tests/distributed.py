"""Run a function on N real gloo processes.

The processes are forked from a server that has imported torch and started no threads, so that one costs a fraction of a
second and none inherits a half-locked thread pool.
"""

import multiprocessing
import os
import queue
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from shardstep.launch.ranks import free_port

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["accelerate", "matplotlib.pyplot", "cv2", "shardstep.trainer.setup", "shardstep.launch.train"]
)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new world; returns what each rank returned, by rank.

    Raises:
        AssertionError: a rank raised or did not end in time; the message has the first traceback.
    """
    port, results = free_port(), context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, world_size, port, function, arguments, results))
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
            process.join(timeout=10 if len(outcomes) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [outcomes[rank] for rank in range(world_size)]


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
    warnings.simplefilter("error")  # pytest's own filter does not reach here
    # wandb's own use of pydantic is not ours to mend
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="wandb|pydantic")


def _run_rank(rank: int, world_size: int, port: int, function: Callable, arguments: tuple, results: Any) -> None:
    import torch.distributed as dist

    join_world(rank, world_size, port)
    try:
        results.put((rank, True, function(*arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
