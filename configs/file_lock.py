"""File locks that the system releases when their holder ends, however it ends."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_RETRY_S = 0.5
_BRIEF_RETRY_S = 0.05  # without patience: is_locked() of another process holds a lock for an instant


def lock(file: IO, patience_s: float | None = None) -> None:
    """Lock an open file exclusively until it is closed.

    Args:
        file: open for reading or writing.
        patience_s: how long to wait for another holder; None waits forever.

    Raises:
        BlockingIOError: another process still holds the lock.
        OSError: the file system has no locks, as some network file systems.
    """
    if patience_s is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + max(patience_s, _RETRY_S)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S if patience_s else _BRIEF_RETRY_S)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if needed; waits for another holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        lock(file)
        yield


def is_locked(path: Path) -> bool:
    """Check whether a process holds the lock, here or on another machine that shares the file system."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once, when the file is closed
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        return False
    return False
