import io
import tarfile
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
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
