"""Run a command in a process of its own: what it prints is shown here, its errors are raised here.

So the caller's process stays as it is: its signal handlers, its number of threads, its random state, its memory. A run that
is killed or hangs does not take a notebook with it.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.launch.cli import BAD_INPUT
from shardstep.launch.entry import INTERRUPTED, STOPPED
from shardstep.trainer.distributed import launch_env

_ERRORS = ("error: ", "failed: ")  # how a command begins the message that it ends with
_OTHERS = (*_ERRORS, "warning: ")
_POLL_S = 0.5


def run_command(script: Path, arguments: list[str], show: Callable[[str], None], tell: Callable[[str], None]) -> None:
    """Run a script of launch/ until it has ended; pass Ctrl-C on to it.

    Args:
        show: called with each line of its stdout.
        tell: called with each line of its stderr, except the error that it ends with.

    Raises:
        InputError: it has refused its input.
        TrainingFailed: it has failed.
        KeyboardInterrupt: Ctrl-C has ended it before there was anything to save.
    """
    search_path = os.pathsep.join(dict.fromkeys(folder or os.getcwd() for folder in sys.path))
    error: list[str] = []
    is_error = False
    with _interrupts() as pass_on_to:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in the process, until it can obey
        try:
            process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | {"PYTHONPATH": search_path} | launch_env.environment_of_call(),
                start_new_session=True,  # a terminal and Jupyter send Ctrl-C to a whole group; it is to arrive once
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pass_on_to(process)
        try:
            for is_stderr, line in _lines(process):
                if not is_stderr:
                    show(line)
                    continue
                if line.startswith(_OTHERS):
                    is_error = line.startswith(_ERRORS) and not error
                (error.append if is_error else tell)(line)
            code = process.wait()
        finally:
            if process.poll() is None:  # what shows its output has failed
                process.terminate()
                process.wait()
    message = "\n".join(error).partition(": ")[2]
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == BAD_INPUT:
        raise InputError(message or f"{script.stem} has refused its input; what it printed says why")
    if code not in (0, STOPPED):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise TrainingFailed(message or f"{script.stem} {how}; what it printed says more")


def _lines(process: subprocess.Popen[str]) -> Iterator[tuple[bool, str]]:
    """Yield the lines of both outputs as they come, and whether each is of stderr."""
    lines: queue.SimpleQueue[tuple[bool, str | None]] = queue.SimpleQueue()

    def read(stream: IO[str] | None, is_stderr: bool) -> None:
        assert stream
        with stream:
            for line in stream:
                lines.put((is_stderr, line.removesuffix("\n")))
        lines.put((is_stderr, None))

    for stream, is_stderr in ((process.stdout, False), (process.stderr, True)):
        threading.Thread(target=read, args=(stream, is_stderr), name="output", daemon=True).start()
    num_open = 2
    while num_open:
        try:
            is_stderr, line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            if process.poll() is None:
                continue
            return  # a killed command's children may still hold its outputs
        if line is None:
            num_open -= 1
        else:
            yield is_stderr, line


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[subprocess.Popen[str]], None]]:
    """Keep Ctrl-C from raising KeyboardInterrupt in a block; yield a function that passes it on to a process from then on."""
    process: subprocess.Popen[str] | None = None
    is_waiting = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal is_waiting
        if process:
            process.send_signal(number)
        else:
            is_waiting = True

    def pass_on_to(started: subprocess.Popen[str]) -> None:
        nonlocal process
        process = started
        if is_waiting:  # it came while the process was being started
            process.send_signal(signal.SIGINT)

    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # no other gets signals
    is_ours = is_main and previous not in (signal.SIG_IGN, None)
    if is_ours:
        signal.signal(signal.SIGINT, pass_on)
    try:
        yield pass_on_to
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, previous)
