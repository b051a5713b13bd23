"""A strict reader of tar headers: a path in, the place of every member out, an error for any damage.

Python's tarfile stops silently at a damaged header or a cut, and a shard with half its samples looks complete. Here every
header's checksum must match, every member must lie inside the file, and only zeros may follow the last one.
Formats: ustar, GNU long names, and pax headers for path and size (POSIX.1-2001, "pax Interchange Format").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardstep.configs.errors import InputError

BLOCK = 512
REGULAR, REGULAR_OLD, HARD_LINK, LONG_NAME, PAX, PAX_GLOBAL = b"0", b"\0", b"1", b"L", b"x", b"g"


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar: `size` bytes from byte `offset` of the archive."""

    name: str
    offset: int
    size: int


def read_members(path: Path) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in their order in the archive.

    Raises:
        InputError: the archive is cut off, damaged, compressed, or not a tar; the message gives the byte.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        yield from _read_members(file, total, str(path))


def _read_members(file: BinaryIO, total: int, path: str) -> Iterator[Member]:
    position, long_name = 0, None
    pax: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise InputError(f"{path} is cut off at byte {total}: a tar ends with blocks of zeros")
        if not any(header):
            _check_end(file, path)
            return
        if not _checksum_holds(header):
            raise InputError(f"{path} is damaged, or not a plain tar: the header at byte {position} fails its checksum")

        kind, size = header[156:157], _number(header[124:136], path, position)
        size = int(pax.get("size", size))
        data, padded = position + BLOCK, -(-size // BLOCK) * BLOCK
        if data + size > total:
            raise InputError(f"{path} is cut off: the member at byte {position} needs {data + size - total} bytes more")
        if kind == LONG_NAME:
            long_name = _text(file.read(size).rstrip(b"\0"), path, position)
        elif kind == PAX:
            pax = _pax_records(file.read(size), path, position)
        else:
            name = pax.get("path") or long_name or _name(header, path, position)
            if kind == HARD_LINK:
                raise InputError(f"{path}: {name} is a hard link; pack the files themselves (tar --hard-dereference)")
            if kind in (REGULAR, REGULAR_OLD):
                yield Member(name, data, size)
            if kind != PAX_GLOBAL:
                long_name, pax = None, {}
        position = data + padded


def _checksum_holds(header: bytes) -> bool:
    # The sum of all bytes of the header, with the checksum's eight bytes counted as spaces.
    stored = header[148:156].partition(b"\0")[0].strip()
    if not stored or not all(48 <= digit < 56 for digit in stored):
        return False
    return int(stored, 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes, path: str, position: int) -> int:
    if field[0] & 0x80:  # base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not all(48 <= digit < 56 for digit in digits):
        raise InputError(f"{path} is damaged: the header at byte {position} has no valid size")
    return int(digits, 8)


def _name(header: bytes, path: str, position: int) -> str:
    name = _text(header[:100].partition(b"\0")[0], path, position)
    prefix = _text(header[345:500].partition(b"\0")[0], path, position) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes, path: str, position: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: the name {data!r} in the header at byte {position} is not UTF-8") from None


def _check_end(file: BinaryIO, path: str) -> None:
    """Check that only zeros follow the first block of zeros: a lost header would hide the members after it."""
    place = file.tell()
    while chunk := file.read(1 << 20):
        if any(chunk):
            raise InputError(f"{path} is damaged: there is data after a block of zeros, from byte {place} on")
        place += len(chunk)


def _pax_records(data: bytes, path: str, position: int) -> dict[str, str]:
    records = {}
    try:
        while data.rstrip(b"\0"):
            length = int(data.split(b" ", 1)[0])  # "30 path=some/long/name\n": the record's length counts itself
            key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            records[key.decode()] = value.decode()
            data = data[max(length, 1) :]
        if not records.get("size", "0").isdecimal():
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(f"{path} is damaged: the pax header at byte {position} cannot be read") from None
    return records
