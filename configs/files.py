"""Files on disk: written atomically, flushed, hashed; and a check of the files that options name."""

import contextlib
import hashlib
import os
from pathlib import Path

from shardstep.configs.errors import InputError


def partial_of(path: Path) -> Path:
    """Return the temporary name under which `write_atomically` writes first; a kill can leave it behind."""
    return path.with_name(path.name + ".partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by rename, so that even after a kill or a power cut it is complete, or still the old one.

    Raises:
        OSError: it cannot be written; the old file is still there. Its `filename` is set.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk
        if error.errno is not None:  # without one, the error prints as its text, which a filename would hide
            error.filename = str(path)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_output_file(option: str, path: Path) -> None:
    """Check before the work starts that the file of an option can be written.

    Raises:
        InputError: `path` is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise InputError(f"{option}={path} is a folder: give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option}={path}: there is no folder {path.absolute().parent}")
