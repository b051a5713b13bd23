"""The node's cache folder, and the lock that lets one process make what all others on the node then use."""

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
