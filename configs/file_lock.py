"""File locks that the system releases when their holder ends, however it ends."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_RETRY_S = 0.5
_MOST_TRIES = 1000  # each follows the end of another holder
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
    """Hold an exclusive lock; waits for another holder. Leaves neither the lock's file nor empty folders created for it.

    Raises:
        OSError: the file cannot be created, or the file system has no locks.
    """
    file, created = _open_locked(path)
    with file:
        try:
            yield
        finally:
            # While it is locked, so that who gets the lock next sees that file and folders are gone.
            with contextlib.suppress(OSError):  # another user's file, in a folder such as /tmp; a folder that is in use
                path.unlink()
                for folder in reversed(created):
                    folder.rmdir()


def _open_locked(path: Path) -> tuple[IO[str], list[Path]]:
    """Open and lock the file at a path; begins again if its last holder removed it. Returns new folders, too."""
    for _ in range(_MOST_TRIES):
        created = []
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            for folder in [folder for folder in reversed(path.parents) if not folder.exists()]:
                with contextlib.suppress(FileExistsError):  # another process has just created it
                    folder.mkdir()
                    created.append(folder)
            file = stack.enter_context(path.open("w"))
            lock(file)
            with path.open() as there:  # asks the server of a network file system, unlike stat
                if os.path.sameopenfile(file.fileno(), there.fileno()):
                    stack.pop_all()
                    return file, created
    raise OSError(errno.EBUSY, "removed again and again by other holders", str(path))


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
