"""The lock of a run's folder: one run at a time; the system releases it when its holder ends, however it ends."""

import contextlib
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import is_locked, lock

LOCK_NAME = ".lock"
_held: dict[tuple[int, int], IO[str]] = {}  # by device and inode; keeps the files open until release() or the end


def hold(folder: Path, warn: Callable[[str], None], patience_s: float = 0.0) -> bool:
    """Lock a run's folder until this process ends. Rank 0.

    Args:
        warn: called with a message if the file system has no locks; the run continues without one.
        patience_s: how long to wait for another process to end.

    Returns:
        Whether this call locked it, rather than an earlier one of this process.

    Raises:
        InputError: another process holds the lock, or the folder is not writable.
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
    try:
        lock(file, patience_s)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"run.dir={folder} is in use by {holder}. Wait until it ends, stop it with "
            f"`touch {folder / 'STOP'}`, or choose another run.dir or run.name"
        ) from None
    except OSError as error:
        warn(f"{path} cannot be locked ({error.strerror}): make sure that no other run writes to this folder")
    _held[place.st_dev, place.st_ino] = file
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {now}\n")
        file.flush()
    return True


def release(folder: Path) -> None:
    """Release the lock of a run's folder before this process ends, for a process that makes many runs."""
    place = os.stat(folder / LOCK_NAME)
    file = _held.pop((place.st_dev, place.st_ino), None)
    if file is not None:
        file.close()


def is_held(folder: Path) -> bool:
    """Check whether a process, here or on another machine that shares the file system, runs in a run's folder."""
    return is_locked(folder / LOCK_NAME)
