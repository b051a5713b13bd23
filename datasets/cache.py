"""The node's cache folder, the lock under which one process makes what all on the node use, and safe arrival on disk."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """$SHARDSTEP_CACHE, else $XDG_CACHE_HOME/shardstep, else ~/.cache/shardstep."""
    explicit = os.environ.get("SHARDSTEP_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardstep"


@contextlib.contextmanager
def node_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
