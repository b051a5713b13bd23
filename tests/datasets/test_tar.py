import io
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets import tar
from shardstep.datasets.tar import read_members


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_says(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" + "x" * 90 + "/" + "y" * 80  # beyond the 100 bytes of a plain name
    members = {
        "a.png": b"1",
        long: b"2" * 513,
        "empty": b"",
        "ü.png" if tar_format == tarfile.PAX_FORMAT else "u.png": b"3",
    }
    path = write_tar(tmp_path / "x.tar", members, tar_format)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(member.name, member.offset, member.size) for member in read_members(path)] == expected


def with_checksum(header: bytes) -> bytes:
    return header[:148] + b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256) + header[156:]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("sizes", ["tiny", "images", "around a read", "large and tiny"])
def test_many_members_are_where_tarfile_says(tmp_path: Path, tar_format: int, sizes: str) -> None:
    # Long reads begin anywhere in these tars: at a header, before a member's data, in a name of several blocks.
    draw, read = random.Random(sizes), tar._LONG_READ
    sizes_of = {
        "tiny": lambda: draw.randrange(600),
        "images": lambda: draw.randrange(2000, 40_000),
        "around a read": lambda: read + draw.randrange(-1100, 1100),
        "large and tiny": lambda: draw.choice([1, 700, 3 * read]),
    }
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tar_format) as written:
        for number in range(900 if sizes == "tiny" else 40):
            info = tarfile.TarInfo(f"{draw.choice(['', 'folder/' * 20])}{number:04d}.png")
            info.size = sizes_of[sizes]()
            info.mtime = (
                number + 0.5 if tar_format == tarfile.PAX_FORMAT else number
            )  # a pax header each, as WebDataset
            written.addfile(info, io.BytesIO(draw.randbytes(info.size)))
    with tarfile.open(path) as opened:
        expected = [(info.name, info.offset_data, info.size) for info in opened]
    assert [tuple(member) for member in read_members(path)] == expected


def test_unusual_headers_are_read(tmp_path: Path) -> None:
    usual = bytearray(write_tar(tmp_path / "x.tar", {"a.png": b"1" * 8}).read_bytes())
    for size in (b"00000000010 ", b"         10\0", b"10\0\0\0\0\0\0\0\0\0\0", b"\x80" + bytes(10) + b"\x08"):
        usual[124:136] = size
        usual[:512] = with_checksum(bytes(usual[:512]))
        for checksum in (bytes(usual[148:156]), b" " + usual[149:154] + b"\0 ", usual[148:154] + b" \0"):
            (tmp_path / "x.tar").write_bytes(usual[:148] + checksum + usual[156:])
            assert [tuple(member) for member in read_members(tmp_path / "x.tar")] == [("a.png", 512, 8)]


def test_headers_close_together_are_read_and_checked_together(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{number:04d}.cls": b"3" for number in range(2000)})
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        calls[frame.f_code.co_name] += event == "call"

    sys.setprofile(note)
    try:
        list(read_members(path))
    finally:
        sys.setprofile(None)
    assert calls["_checked_size"] == 0
    assert calls["_read"] <= 2000 * 1024 // tar._LONG_READ + 2  # 1 KB a member
    assert calls.total() <= 5 * 2000 + 300  # for each: two generators, its name, its text, and a Member


def test_after_a_large_member_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{number}.jpg": bytes(110_000) for number in range(20)})
    lengths, read = list[int](), tar._read
    monkeypatch.setattr(tar, "_read", lambda file, place, length: lengths.append(length) or read(file, place, length))
    assert len(list(read_members(path))) == 20
    assert sum(lengths) <= 2 * tar._LONG_READ + 20 * 4096  # of 2.2 MB


@pytest.mark.parametrize("place", [0, 100, 124, 134, 147, 156, 300, 511])
def test_a_flipped_byte_in_any_of_many_headers_is_found(tmp_path: Path, place: int) -> None:
    intact = write_tar(tmp_path / "x.tar", {f"{number:03d}.cls": b"3" for number in range(300)}).read_bytes()
    for header in (0, 1, 127, 128, 129, 299):
        damaged = bytearray(intact)
        damaged[1024 * header + place] ^= 1
        (tmp_path / "bad.tar").write_bytes(damaged)
        with pytest.raises(InputError, match=f"byte {1024 * header} fails its checksum"):
            list(read_members(tmp_path / "bad.tar"))


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("file"))
    assert [member.name for member in read_members(path)] == ["file"]


def test_every_truncation_is_found(tmp_path: Path) -> None:
    intact = write_tar(tmp_path / "x.tar", {"a.png": b"1" * 700, "a.cls": b"3"}).read_bytes()
    end = 512 + 1024 + 512 + 512 + 512  # two members and the first block of zeros
    for length in range(0, end, 64):
        (tmp_path / "cut.tar").write_bytes(intact[:length])
        with pytest.raises(InputError, match="cut off"):
            list(read_members(tmp_path / "cut.tar"))


def test_every_flipped_header_byte_is_found(tmp_path: Path) -> None:
    intact = write_tar(tmp_path / "x.tar", {"a.png": b"1" * 700, "a.cls": b"3"}).read_bytes()
    for start in (0, 1536):
        for place in range(start, start + 512):
            damaged = bytearray(intact)
            damaged[place] ^= 0x10
            (tmp_path / "bad.tar").write_bytes(damaged)
            if start + 148 <= place < start + 156:
                continue  # of the checksum's own field, not every byte counts
            with pytest.raises(InputError):
                list(read_members(tmp_path / "bad.tar"))


def test_compressed_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("file"))
    with pytest.raises(InputError, match="not a plain tar|cut off"):
        list(read_members(tmp_path / "x.tar"))


def test_damaged_pax_header(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "x.tar", {"ü" * 80: b"1"}, tarfile.PAX_FORMAT).read_bytes())
    data[512] = ord("x")  # the length of the first record
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(InputError, match="pax header"):
        list(read_members(tmp_path / "x.tar"))


def test_a_lost_header_does_not_hide_what_follows(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "x.tar", {"a.png": b"1", "b.png": b"2"}).read_bytes())
    data[1024:1536] = bytes(512)  # the second header, as a lost disk block leaves it
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(InputError, match="data after a block of zeros"):
        list(read_members(tmp_path / "x.tar"))


def test_hard_links_and_strange_names_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    with pytest.raises(InputError, match="b.png is a hard link"):
        list(read_members(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.png"))
    with pytest.raises(InputError, match="not UTF-8"):
        list(read_members(tmp_path / "y.tar"))


@pytest.mark.parametrize("size", [b"-0000001000\0", b"0000000x000\0"])
def test_sizes_that_are_none(tmp_path: Path, size: bytes) -> None:
    data = bytearray(write_tar(tmp_path / "x.tar", {"a.png": b"1"}).read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(InputError, match="no valid size"):
        list(read_members(tmp_path / "x.tar"))
