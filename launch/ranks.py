"""Start ranks on this machine without torchrun or accelerate, for `shardstep train --nproc N`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from shardstep.launch.cli import FAILED
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.stopping.stop_requests import HELD_BACK

TRAIN_SCRIPT = Path(__file__).with_name("train.py")
_GRACE_S = 60.0  # for the other ranks to notice the failure and end by themselves
_POLL_S = 0.1


def start_ranks(count: int, command: list[str]) -> int:
    """Run a command once for each of `count` ranks, pass signals on to all of them, and wait for the last to end.

    Returns:
        0 if every rank returned 0, else the exit code of the first that did not; 1 if a signal killed it.
    """
    port, parent = free_port(), launch_env.parent()
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    # A signal must not come between two ranks, or before a rank can obey it: it waits until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    for number in HELD_BACK:
        signal.signal(number, pass_on)
    for rank in range(count):
        environment = os.environ | launch_env.environment_of_rank(rank, count, port)
        # Each in its own session: Ctrl-C reaches it once, from here.
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    first_failure: int | None = None
    is_orphan = False
    failed_s = float("inf")
    while any(process.poll() is None for process in processes):
        codes = [process.returncode for process in processes]
        if first_failure is None and any(codes):
            first_failure, failed_s = next(code for code in codes if code), time.monotonic()
        late_s = time.monotonic() - failed_s
        if late_s > _GRACE_S:
            pass_on(signal.SIGTERM if late_s < 2 * _GRACE_S else signal.SIGKILL)
        if not is_orphan and os.getppid() != parent and launch_env.ends_with_parent():
            is_orphan = True
            pass_on(signal.SIGTERM)
        time.sleep(_POLL_S)
    code = first_failure or next((process.returncode for process in processes if process.returncode), 0)
    for rank, process in enumerate(processes):
        if process.returncode < 0:
            print(f"failed: rank {rank} was killed by {signal.Signals(-process.returncode).name}", file=sys.stderr)
    return code if code >= 0 else FAILED


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
