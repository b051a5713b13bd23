"""One run at a time in a folder: a lock that the system releases when its holder ends, however it ends."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from shardstep.configs.errors import InputError

LOCK_NAME = ".lock"
_RETRY_S = 0.5
_GLANCE_S = 0.05  # between looks where nobody is waited for but is_held(), which has the lock for a moment
_held: dict[tuple[int, int], IO[str]] = {}  # by device and inode: for the life of this process, whatever it runs


def hold(folder: Path, warn: Callable[[str], None], patience_s: float = 0.0) -> bool:
    """Hold the lock of a run's folder from now until this process ends. Rank 0.

    Args:
        folder: must exist.
        warn: told where the file system has no locks; the run goes on without.
        patience_s: for another process to end.

    Returns:
        Whether it is held only since now.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"run.dir={folder} cannot be used: {error}") from None
    place = os.fstat(file.fileno())
    if (place.st_dev, place.st_ino) in _held:
        file.close()
        return False
    deadline = time.monotonic() + max(patience_s, _RETRY_S)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = _holder(file)
                file.close()
                raise InputError(
                    f"run.dir={folder} is in use by {holder}. Wait for its end, ask it to stop with "
                    f"`touch {folder / 'STOP'}`, or give another run.dir or run.name"
                ) from None
            time.sleep(_RETRY_S if patience_s else _GLANCE_S)
        except OSError as error:  # some network file systems
            warn(f"{path} cannot be locked ({error.strerror}): see to it that no other run writes to this folder")
            break
    _held[place.st_dev, place.st_ino] = file
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # on a full disk it is a lock all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {now}\n")
        file.flush()
    return True


def release(folder: Path) -> None:
    """Give the lock of a run's folder back before this process ends, as one that makes many runs does."""
    place = os.stat(folder / LOCK_NAME)
    file = _held.pop((place.st_dev, place.st_ino), None)
    if file is not None:
        file.close()


def is_held(folder: Path) -> bool:
    """Whether a process, here or on another machine that shares the file system, holds the lock of a run's folder."""
    try:
        with (folder / LOCK_NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed, at once
    except BlockingIOError:
        return True
    except OSError:  # there is none, or no locks
        return False
    return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"
