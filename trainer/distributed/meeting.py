"""What ranks wait for before they have met: the name of rank 0's machine, its port, and each other. No torch here."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from shardstep.configs.errors import InputError
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.launch_env import meeting_point

_SILENCE_S = 5.0  # ranks that meet in this time print nothing
_LATE_NAME_S = 120.0  # Kubernetes publishes the name of a pod some seconds after the pod has started
_LOOK_AGAIN_S = 0.1


@contextlib.contextmanager
def waiting_aloud(what: str) -> Iterator[None]:
    """Print on stderr what this rank waits for, if the block takes longer than a few seconds."""
    text = f"rank {launch_env.rank()} waits for {what}"
    timer = threading.Timer(_SILENCE_S, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def keeps_store(environment: Mapping[str, str]) -> bool:
    """Return whether this process keeps the store in which the ranks meet; else rank 0 does, or the launcher's agent."""
    return environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def wait_for_store(environment: Mapping[str, str], timeout_s: float) -> None:
    """Wait until MASTER_ADDR resolves and, unless this process keeps the store, until its port answers.

    torch would wait without a word, and in the end print stacks.

    Args:
        timeout_s: how long ranks wait for each other; a name gets at most two minutes of it.

    Raises:
        InputError: the name does not resolve in time.
        TimeoutError: nothing answers there in time.
    """
    _wait_for_name(environment["MASTER_ADDR"], min(timeout_s, _LATE_NAME_S))
    if keeps_store(environment):
        return
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    deadline = time.monotonic() + timeout_s
    with waiting_aloud(f"rank 0, or the launcher, to listen at {meeting_point(environment)}"):
        while True:
            try:
                socket.create_connection(address, timeout=timeout_s).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(error.strerror or str(error)) from None
                time.sleep(_LOOK_AGAIN_S)


def _wait_for_name(address: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with waiting_aloud(f"the name MASTER_ADDR={address} to resolve, at most {timeout_s:g} s"):
        while problem := _name_problem(address):
            if time.monotonic() > deadline:
                error = InputError(
                    f"MASTER_ADDR={address} does not resolve on {socket.gethostname()}: {problem}. "
                    f"Set it to the name or address of the machine of rank 0"
                )
                error.everywhere = False  # other machines may know the name
                raise error
            time.sleep(_LOOK_AGAIN_S)


def _name_problem(address: str) -> str | None:
    """Return why a name does not resolve, or None."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError as error:  # longer than a name can be, for one
        return str(error)
    return None
