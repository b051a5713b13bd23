import io
import os
import random
import subprocess
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
    assert [member[:3] for member in read_members(path)] == expected


def test_unusual_headers_are_read(tmp_path: Path) -> None:
    usual = bytearray(write_tar(tmp_path / "x.tar", {"a.png": b"1" * 8}).read_bytes())
    for size in (b"00000000010 ", b"         10\0", b"10\0\0\0\0\0\0\0\0\0\0", b"\x80" + bytes(10) + b"\x08"):
        usual[124:136] = size
        usual[:512] = with_checksum(bytes(usual[:512]))
        for checksum in (bytes(usual[148:156]), b" " + usual[149:154] + b"\0 ", usual[148:154] + b" \0"):
            (tmp_path / "x.tar").write_bytes(usual[:148] + checksum + usual[156:])
            assert [member[:3] for member in read_members(tmp_path / "x.tar")] == [("a.png", 512, 8)]


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


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_member_is_told(tmp_path: Path, tar_format: int) -> None:
    far = "x" * 70 + "/" + ("y" if tar_format == tarfile.USTAR_FORMAT else "y" * 80)  # beyond 100 bytes of a plain name
    kinds = {
        "d": (tarfile.DIRTYPE, "", "folder"),
        "l": (tarfile.SYMTYPE, far, "link"),
        "h": (tarfile.LNKTYPE, far, "hard link"),
        "i": (b"D", "", "folder"),
        "p": (tarfile.FIFOTYPE, "", "special file"),
        "c": (tarfile.CHRTYPE, "", "special file"),
        "n" * 120 if tar_format != tarfile.USTAR_FORMAT else "n": (tarfile.SYMTYPE, far, "link"),
        "7": (tarfile.CONTTYPE, "", "file"),
        "file": (tarfile.REGTYPE, "", "file"),
    }
    with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as tar:
        for name, (kind, target, _) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    found = [(member.name.rstrip("/"), member.kind, member.target) for member in read_members(tmp_path / "x.tar")]
    assert found == [(name, kind, target) for name, (_, target, kind) in kinds.items()]


def test_links_have_no_data_whatever_their_size_says(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("l", tarfile.SYMTYPE), ("d", tarfile.DIRTYPE), ("file", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "file"
            tar.addfile(info)
    data = bytearray((tmp_path / "x.tar").read_bytes())
    for start in (0, 512):
        data[start + 124 : start + 136] = b"%011o\0" % 4096
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    (tmp_path / "x.tar").write_bytes(data)
    assert [member.name.rstrip("/") for member in read_members(tmp_path / "x.tar")] == ["l", "d", "file"]


def test_extended_attributes_need_not_be_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("\u00fc")
        info.pax_headers = {"SCHILY.xattr.user.a": b"\xff\xfe".decode(errors="surrogateescape")}
        tar.addfile(info)
    assert [member.name for member in read_members(tmp_path / "x.tar")] == ["\u00fc"]


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_sparse_files_are_refused(tmp_path: Path, tar_format: str) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", f"--format={tar_format}", "--sparse", "-cf", "x.tar", "a.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(InputError, match=r"a\.png is stored as a sparse file"):
        list(read_members(tmp_path / "x.tar"))


@pytest.mark.parametrize("kind", ["FIFO", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.tar"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(InputError, match="does not exist" if kind == "nothing" else "not a regular file"):
        list(read_members(path))


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
    with pytest.raises(
        InputError, match=r"is compressed: unpack it with `mv .*x\.tar .*x\.tar\.gz && gunzip .*x\.tar\.gz`"
    ):
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


def test_strange_names_are_named(tmp_path: Path) -> None:
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
