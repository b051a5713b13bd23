"""Parquet files, opened with pyarrow, which is an optional package."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shardstep.configs.errors import InputError
from shardstep.configs.text import printable

_BUFFER = 1 << 20  # bytes


@contextlib.contextmanager
def open_parquet(path: Path, content: BinaryIO) -> Iterator[Any]:
    """Open a pyarrow.parquet.ParquetFile; `path` is for messages.

    Raises:
        InputError: pyarrow is not installed, or what the block reads is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: to read parquet files, pip install pyarrow") from None
    try:
        # Without pre_buffer, and with a buffer, a file that is read in batches is not kept in memory.
        with ParquetFile(content, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {printable(str(error))}") from None
