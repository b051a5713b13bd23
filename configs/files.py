"""Files that appear whole: written under another name, then renamed."""

import os
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes first; a kill can leave it behind."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that there is always a whole one under its name, after a kill or a power cut too.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    partial = partial_of(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
