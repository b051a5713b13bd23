"""A pool of training processes: runs tasks one after another or several at once, each on its part of the machine."""

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

from shardstep.configs.cores import usable_cores
from shardstep.configs.text import count
from shardstep.launch.ranks import TRAIN_SCRIPT

_POLL_S = 0.2
End = Literal["done", "stopped", "out of time"]


@dataclass(frozen=True)
class Task:
    """One run: its name, the arguments of `shardstep train`, and the file that keeps its output."""

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
    """Run tasks in order, each in a separate process, so that a crash of one does not end the others.

    On Ctrl-C, SIGTERM or the loss of the terminal, ask the running ones to save and wait for them; on the next, kill them.

    Args:
        parallel: tasks at once. On CPUs they share the cores equally.
        gpus: names for CUDA_VISIBLE_DEVICES, one per process; empty to train on CPU cores.
        ended: called with each task, its exit code (negative: a signal) and its seconds.
        within_s: start no task that would exceed this time, judging by the longest so far.
        longest_s: seconds of the longest task before this call.

    Returns:
        How it ended. Unless it is "done", some tasks may not have been started.
    """
    began_s = time.monotonic()
    waiting, running = list(tasks), dict[int, tuple[Task, subprocess.Popen[bytes], float]]()
    interrupts, is_announced = 0, False

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
                    if interrupts:  # one arrived during the start
                        process.send_signal(signal.SIGTERM)
            if not running:
                break
            time.sleep(_POLL_S)
            if interrupts and not is_announced:
                names = ", ".join(task.name for task, _, _ in running.values())
                kill = "press Ctrl-C again to kill without saving"
                print(f"{names}: saving after this step; {kill}", file=sys.stderr, flush=True)
                is_announced = True
            for slot, (task, process, started_s) in list(running.items()):
                if process.poll() is not None:
                    seconds = time.monotonic() - started_s
                    longest_s = max(longest_s, seconds)
                    del running[slot]
                    ended(task, process.returncode, seconds)
    finally:
        for _, process, _ in running.values():  # after an error of ours, nothing else would end them
            process.send_signal(signal.SIGTERM)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return "stopped" if interrupts else "out of time" if waiting else "done"


def share_of_run(parallel: int, gpus: Sequence[str]) -> str:
    """Describe the share of this machine that each of several concurrent runs has."""
    cores = usable_cores().count
    room, kind = (len(gpus), "GPU") if gpus else (cores, "core")
    if parallel > room:
        return f"{count(room, kind)} together with {parallel - 1} more"
    return "a GPU" if gpus else count(cores // parallel, "thread")


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    names, num_gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return names.split(",")[:num_gpus] if names else [str(number) for number in range(num_gpus)]


def _start(task: Task, slot: int, parallel: int, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
    task.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN_SCRIPT), *task.arguments]
    with task.log.open("ab") as log:
        # In a new session: otherwise Ctrl-C would reach it twice, from the terminal and from here.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    share = usable_cores().count // parallel  # the same for each; the remainder idles
    if not gpus and parallel > 1 and share:
        cores = sorted(os.sched_getaffinity(0))[slot * share : (slot + 1) * share]
        os.sched_setaffinity(process.pid, cores)  # before the process has threads, which inherit it
    return process
