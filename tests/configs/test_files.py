"""An option's output file is refused before the work, where it cannot be written."""

from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file


def test_an_output_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_output_file("--out", tmp_path / "new.html")
    with pytest.raises(InputError, match=r"--out=.* is a folder: give the name of a file in it"):
        check_output_file("--out", tmp_path)
    with pytest.raises(InputError, match=r"--out=.*: there is no folder .*nowhere"):
        check_output_file("--out", tmp_path / "nowhere" / "new.html")
