"""Training commands to processes of their own, one after another or several at once, each on its part of the machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from shardstep.launch.ranks import TRAIN_SCRIPT

_POLL_S = 0.2
End = Literal["done", "stopped", "out of time"]


@dataclass(frozen=True)
class Task:
    """One run: what to call it, what `shardstep train` is told, and where what it prints is kept."""

    name: str
    arguments: list[str]
    log: Path


def run_tasks(
    tasks: Sequence[Task],
    parallel: int,
    gpus: Sequence[str],
    ended: Callable[[Task, int, float], None],
    within_s: float = float("inf"),
    longest_s: float = 0.0,
) -> End:
    """Run tasks in order, each in a process of its own, so that a crash of one is not the others' end.

    Ctrl-C, SIGTERM and the loss of the terminal ask the running ones to save, and wait for them; a second one ends them.

    Args:
        tasks: to run.
        parallel: how many at once. On CPUs they divide the cores among them.
        gpus: as CUDA_VISIBLE_DEVICES names them, one a process; empty trains on CPU cores.
        ended: told of each task, its exit code (negative: of a signal) and its seconds.
        within_s: no task is begun that would not end in this time, going by the longest so far.
        longest_s: that one has taken before this call.

    Returns:
        How it ended: some tasks may not have been begun unless it is done.
    """
    began_s = time.monotonic()
    waiting, running = list(tasks), dict[int, tuple[Task, subprocess.Popen[bytes], float]]()
    interrupts, told = 0, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        for _, process, _ in running.values():
            process.send_signal(signal.SIGTERM if interrupts == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while running or (waiting and not interrupts):
            late = time.monotonic() - began_s + longest_s > within_s
            for slot in range(parallel):
                if waiting and slot not in running and not interrupts and not late:
                    task = waiting.pop(0)
                    process = _start(task, slot, parallel, gpus)
                    running[slot] = (task, process, time.monotonic())
                    if interrupts:  # which came while it was started
                        process.send_signal(signal.SIGTERM)
            if not running:
                break
            time.sleep(_POLL_S)
            if interrupts and not told:
                names = ", ".join(task.name for task, _, _ in running.values())
                print(f"{names}: saving after this step; Ctrl-C again ends without it", file=sys.stderr, flush=True)
                told = True
            for slot, (task, process, started_s) in list(running.items()):
                if process.poll() is not None:
                    seconds = time.monotonic() - started_s
                    longest_s = max(longest_s, seconds)
                    del running[slot]
                    ended(task, process.returncode, seconds)
    finally:
        for _, process, _ in running.values():  # after an error of ours: nobody else would end them
            process.send_signal(signal.SIGTERM)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return "stopped" if interrupts else "out of time" if waiting else "done"


def share_of_run(parallel: int, gpus: Sequence[str]) -> str:
    """What each of several runs at once has of this machine, in words."""
    cores = len(os.sched_getaffinity(0))
    room, kind = (len(gpus), "GPU") if gpus else (cores, "core")
    if parallel > room:
        return f"{room} {kind}{'s' * (room > 1)} together with {parallel - 1} more"
    threads = cores // parallel
    return "a GPU" if gpus else f"{threads} thread{'s' * (threads > 1)}"


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    args = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return args.split(",")[:count] if args else [str(number) for number in range(count)]


def _start(task: Task, slot: int, parallel: int, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    task.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN_SCRIPT), *task.arguments]
    with task.log.open("ab") as log:
        # In a session of its own: Ctrl-C comes from here, once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    cores = sorted(os.sched_getaffinity(0))
    if not gpus and parallel > 1 and len(cores) >= parallel:
        share = len(cores) // parallel  # as many for each: what is left over idles
        os.sched_setaffinity(
            process.pid, cores[slot * share : (slot + 1) * share]
        )  # before it has threads: they inherit it
    return process
