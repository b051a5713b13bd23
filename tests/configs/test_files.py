"""Files are written completely or not at all; an output file that cannot be written is refused before the work."""

import errno
import os
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file, write_atomically


def test_an_output_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_output_file("--out", tmp_path / "new.html")
    with pytest.raises(InputError, match=r"--out=.* is a folder: give the name of a file in it"):
        check_output_file("--out", tmp_path)
    with pytest.raises(InputError, match=r"--out=.*: there is no folder .*nowhere"):
        check_output_file("--out", tmp_path / "nowhere" / "new.html")


def test_a_full_disk_is_reported_with_the_file_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "page.html").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "page.html", b"after")
    assert caught.value.filename == str(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"
