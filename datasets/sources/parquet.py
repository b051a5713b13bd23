"""Files of columns, parquet and Arrow, opened with pyarrow, which is an optional package."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shardstep.configs.errors import InputError
from shardstep.configs.text import printable

COLUMN_FILES = ("parquet", "arrow")  # extensions
_BUFFER = 1 << 20  # bytes
# Of the two kinds of Arrow files: what a file with an index of its batches begins with, and what a stream ends with.
_INDEXED = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class Columns(Protocol):
    """An open file of columns: what is used here of pyarrow.parquet.ParquetFile."""

    schema_arrow: Any

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
        """Yield record batches of some columns."""

    def read(self, columns: list[str] | None = None) -> Any:
        """Return a table of some columns, or of all."""


class _ArrowFile:
    """An Arrow file or stream as Columns."""

    def __init__(self, content: BinaryIO) -> None:
        from pyarrow import ArrowInvalid, ipc

        self._content = content
        self._open = ipc.open_file if content.read(len(_INDEXED)) == _INDEXED else ipc.open_stream
        if self._open is ipc.open_stream:  # pyarrow takes a stream that is cut off between two batches for a whole one
            content.seek(max(0, content.seek(0, os.SEEK_END) - len(_END_OF_STREAM)))
            if content.read() != _END_OF_STREAM:
                raise ArrowInvalid("it has no mark at its end, so it is cut off, or no Arrow stream")
        self.schema_arrow = self._reader(None).schema

    def _reader(self, columns: list[str] | None) -> Any:
        from pyarrow import ipc

        fields = None if columns is None else [self.schema_arrow.get_field_index(name) for name in columns]
        self._content.seek(0)
        return self._open(self._content, options=ipc.IpcReadOptions(included_fields=fields))

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
        """Yield the batches as they were written; Hugging Face's have at most 1,000 rows."""
        reader = self._reader(columns)
        if hasattr(reader, "num_record_batches"):
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    def read(self, columns: list[str] | None = None) -> Any:
        return self._reader(columns).read_all()


@contextlib.contextmanager
def open_columns(path: Path, content: BinaryIO) -> Iterator[Columns]:
    """Open a file of columns; `path`, whose extension says the format, is for messages.

    Raises:
        InputError: pyarrow is not installed, or what the block reads is damaged.
    """
    kind = "arrow" if path.suffix.lower() == ".arrow" else "parquet"
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: to read {kind} files, pip install pyarrow") from None
    try:
        if kind == "arrow":
            yield _ArrowFile(content)
            return
        # Without pre_buffer, and with a buffer, a file that is read in batches is not kept in memory.
        with ParquetFile(content, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {printable(str(error))}") from None
