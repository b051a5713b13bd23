"""Files that appear whole: written under another name, then renamed; and whether an option's file can be written."""

import contextlib
import os
from pathlib import Path

from shardstep.configs.errors import InputError


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes first; a kill can leave it behind."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that there is always a whole one under its name, after a kill or a power cut too.

    Raises:
        OSError: it cannot be written; what was there before is still there. Its `filename` is set.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk
        if error.errno is not None:  # one without is told by its text, which a filename would hide
            error.filename = str(path)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_output_file(option: str, path: Path) -> None:
    """Find out before the work, rather than after it, that an option's file cannot be written.

    Raises:
        InputError: `path` is a folder, or there is no folder for it.
    """
    if path.is_dir():
        raise InputError(f"{option}={path} is a folder: give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option}={path}: there is no folder {path.absolute().parent}")
