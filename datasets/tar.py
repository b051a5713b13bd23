"""A strict reader of tar headers: a path in, the place of every member out, an error for any damage.

Python's tarfile stops silently at a damaged header or a cut, and a shard with half its samples looks complete. Here every
header's checksum must match, every member must lie inside the file, and only zeros may follow the last one.
Formats: ustar, GNU long names, and pax headers for path, linkpath and size (POSIX.1-2001, "pax Interchange Format").
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from shardstep.configs.errors import InputError

BLOCK = 512
TAR = (".tar",)
PACKED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_UNPACKERS = {  # first bytes of a compressed file -> how its name ends, and the program that unpacks it
    b"\x1f\x8b": ((".gz", ".tgz"), "gunzip"),
    b"BZh": ((".bz2", ".tbz2"), "bunzip2"),
    b"\xfd7zXZ": ((".xz", ".txz"), "unxz"),
    b"\x28\xb5\x2f\xfd": ((".zst",), "unzstd --rm"),
}
REGULAR, CONTIGUOUS, HARD_LINK, LINK, FOLDER, FOLDER_LISTING, REGULAR_OLD = b"07125D\0"
SPARSE, LONG_LINK, LONG_NAME, PAX, PAX_GLOBAL = b"SKLxg"
Kind = Literal["file", "folder", "link", "hard link", "special file"]
_KINDS: dict[int, Kind] = {
    REGULAR: "file", REGULAR_OLD: "file", CONTIGUOUS: "file", HARD_LINK: "hard link", LINK: "link",
    FOLDER: "folder", FOLDER_LISTING: "folder",
}  # fmt: skip
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders and FIFOs, whatever their size says
_PAX_KEYS = (b"path", b"linkpath", b"size")  # the others need not be text, such as extended attributes
_ZEROS = bytes(BLOCK)
# Bytes per read. A header often follows the last one closely, and a long read serves many; after a large member, a short one.
_LONG_READ, _SHORT_READ, _CLOSE = 128 << 10, 4 << 10, 16 << 10
_DIGIT_0 = np.uint8(ord("0"))
_OCTAL = 8 ** np.arange(10, -1, -1)  # the values of 11 digits


class Member(NamedTuple):
    """What a tar holds under a name. A file has `size` bytes from byte `offset` of the archive, a link a `target`."""

    name: str
    offset: int
    size: int
    kind: Kind = "file"
    target: str = ""


def read_members(path: Path, inside: Member | None = None) -> Iterator[Member]:
    """Yield the members of an uncompressed tar, or of a tar inside it, in their order; offsets are those in the file.

    Raises:
        InputError: the archive is cut off, damaged, compressed, or not a tar; the message gives the byte.
    """
    if not path.is_file():  # to open a FIFO would wait for its writer
        raise InputError(f"{path} cannot be read: {'not a regular file' if path.exists() else 'it does not exist'}")
    start, total = (0, path.stat().st_size) if inside is None else (inside.offset, inside.offset + inside.size)
    where = str(path) if inside is None else f"{path}: {inside.name}"
    with path.open("rb") as file:
        if command := unpack_command(path):
            raise InputError(f"{path} is compressed: unpack it with `{command}`")
        yield from _read_members(file, start, total, where)


def unpack_command(path: Path) -> str | None:
    """Return the command that unpacks a compressed file; None if it is not compressed."""
    with path.open("rb") as file:
        first_bytes = file.read(8)
    for magic, (endings, program) in _UNPACKERS.items():
        if first_bytes.startswith(magic):
            packed = path if path.name.lower().endswith(endings) else path.with_name(path.name + endings[0])
            rename = "" if packed == path else f"{shlex.join(['mv', str(path), str(packed)])} && "
            return f"{rename}{program} {shlex.quote(str(packed))}"
    return None


def _read_members(file: BinaryIO, start: int, total: int, path: str) -> Iterator[Member]:
    position, long_name, long_link = start, None, None
    pax: dict[str, str] = {}
    begin, window, sizes = start, b"", list[int]()  # bytes from `begin` on, and the sizes in the headers among them
    while True:
        place = position - begin
        if place + BLOCK > len(window):
            is_close = place - len(window) < _CLOSE
            length = max(0, min(_LONG_READ if is_close else _SHORT_READ, total - position))
            begin, place, window = position, 0, _read(file, position, length)
            if len(window) < BLOCK:
                raise InputError(f"{path} is cut off at byte {total}: a tar ends with blocks of zeros")
            sizes = _sizes_of_usual_headers(window) if is_close else [-1] * (len(window) // BLOCK)
        header, size = window[place : place + BLOCK], sizes[place // BLOCK]
        if size < 0:
            if header == _ZEROS:
                _check_end(file, position + BLOCK, total, path)
                return
            size = _checked_size(header, path, position)
        data, kind = position + BLOCK, header[156]
        if "size" in pax:
            size = int(pax["size"])
        if kind in _WITHOUT_DATA:
            size = 0
        if data + size > total:
            raise InputError(f"{path} is cut off: the member at byte {position} needs {data + size - total} bytes more")
        if kind == LONG_NAME:
            long_name = _text(_read(file, data, size).rstrip(b"\0"), path, position)
        elif kind == LONG_LINK:
            long_link = _text(_read(file, data, size).rstrip(b"\0"), path, position)
        elif kind == PAX:
            pax = _pax_records(_read(file, data, size), path, position)
        elif kind != PAX_GLOBAL:
            name = pax.get("path") or long_name or _name(header, path, position)
            if kind == SPARSE or "sparse" in pax:
                raise InputError(f"{path}: {name} is stored as a sparse file; pack without tar's --sparse")
            if kind == REGULAR_OLD and name.endswith("/"):
                kind = FOLDER
            target = ""
            if kind in (LINK, HARD_LINK):
                target = pax.get("linkpath") or long_link or _text(header[157:257].partition(b"\0")[0], path, position)
            yield Member(name, data, size, _KINDS.get(kind, "special file"), target)
            long_name, long_link, pax = None, None, {}
        position = data + -(-size // BLOCK) * BLOCK


def _read(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def _sizes_of_usual_headers(data: bytes) -> list[int]:
    """Return the size in each block of `data` that is a header as most programs write it, with the right checksum; else -1.

    Together, because a header alone takes ten times as long. What is -1 may be a header as well, or data of a member.
    """
    blocks = np.frombuffer(data, dtype=np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    # "00000001750\0" for the size, "012345\0 " for the checksum
    places = np.flatnonzero((blocks[:, 135] == 0) & (blocks[:, 154] == 0) & (blocks[:, 148] >= ord("0")))
    headers = blocks[places]
    size, checksum = headers[:, 124:135] - _DIGIT_0, headers[:, 148:154] - _DIGIT_0
    headers[:, 148:156] = ord(" ")  # as in the sum that is stored
    sums = headers.sum(axis=1, dtype=np.int32)
    holds = (size < 8).all(axis=1) & (checksum < 8).all(axis=1) & (checksum @ _OCTAL[-6:] == sums)
    sizes = np.full(len(blocks), -1)
    sizes[places[holds]] = size[holds] @ _OCTAL
    return sizes.tolist()


def _checked_size(header: bytes, path: str, position: int) -> int:
    """Return the size in any header, after a check of its checksum."""
    field = header[148:156]
    if _octal(field) != sum(header) - sum(field) + 8 * ord(" "):
        raise InputError(f"{path} is damaged, or not a plain tar: the header at byte {position} fails its checksum")
    return _number(header[124:136], path, position)


def _octal(field: bytes) -> int | None:
    """Return the number in a field, digits between spaces up to the first zero byte; None if there is none."""
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None  # int alone takes signs, underscores and 0o, too
    except ValueError:  # 8 or 9
        return None


def _number(field: bytes, path: str, position: int) -> int:
    if field[0] & 0x80:  # base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    number = _octal(field)
    if number is None and field.partition(b"\0")[0].strip():
        raise InputError(f"{path} is damaged: the header at byte {position} has no valid size")
    return number or 0


def _name(header: bytes, path: str, position: int) -> str:
    name = _text(header[:100].partition(b"\0")[0], path, position)
    if header[345] and header[257:263] == b"ustar\0":
        return _text(header[345:500].partition(b"\0")[0], path, position) + "/" + name
    return name


def _text(data: bytes, path: str, position: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: the name {data!r} in the header at byte {position} is not UTF-8") from None


def _check_end(file: BinaryIO, place: int, total: int, path: str) -> None:
    """Check that only zeros follow the first block of zeros: a lost header would hide the members after it."""
    file.seek(place)
    while chunk := file.read(min(1 << 20, total - place)):
        if any(chunk):
            raise InputError(f"{path} is damaged: there is data after a block of zeros, from byte {place} on")
        place += len(chunk)


def _pax_records(data: bytes, path: str, position: int) -> dict[str, str]:
    records = {}
    try:
        while data.rstrip(b"\0"):
            length = int(data.split(b" ", 1)[0])  # "30 path=some/long/name\n": the record's length counts itself
            key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            if key in _PAX_KEYS:
                records[key.decode()] = value.decode()
            elif key.startswith(b"GNU.sparse."):
                records["sparse"] = ""
            data = data[max(length, 1) :]
        if not records.get("size", "0").isdecimal():
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(f"{path} is damaged: the pax header at byte {position} cannot be read") from None
    return records
