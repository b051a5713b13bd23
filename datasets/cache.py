"""The node's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $SHARDSTEP_CACHE, else $XDG_CACHE_HOME/shardstep, else ~/.cache/shardstep."""
    if explicit := os.environ.get("SHARDSTEP_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardstep"
