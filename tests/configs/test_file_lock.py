"""A lock for as long as a block takes: one holder at a time, and neither its file nor its folders stay behind."""

import os
import time
from pathlib import Path

import pytest

from shardstep.configs.file_lock import file_lock
from tests.distributed import HANG_S, context

TURNS = 150


def count_up(lock: Path, counter: Path, turns: int) -> None:
    """Runs in a process: adds to a number that another one would overwrite."""
    for _ in range(turns):
        with file_lock(lock):
            number = int(counter.read_text())
            os.sched_yield()
            counter.write_text(str(number + 1))


def test_one_holder_at_a_time_though_each_removes_the_file_and_its_folders(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    arguments = (tmp_path / "new" / "er" / ".lock", counter, TURNS)
    processes = [context.Process(target=count_up, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.read_text() == str(6 * TURNS)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["counter"]


def test_who_waited_leaves_no_folder_either(tmp_path: Path) -> None:
    place = tmp_path / "new" / "er" / ".lock"
    counter = tmp_path / "counter"
    counter.write_text("0")
    with file_lock(place):
        waiter = context.Process(target=count_up, args=(place, counter, 1))
        waiter.start()
        time.sleep(1)  # it has the file open
        assert counter.read_text() == "0"
    waiter.join(HANG_S)
    assert (counter.read_text(), waiter.exitcode) == ("1", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


@pytest.mark.parametrize("fails", [False, True])
def test_only_what_was_made_in_a_folder_stays(fails: bool, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for place in (tmp_path / "old" / ".lock", tmp_path / "new" / "er" / ".lock"):
        try:
            with file_lock(place):
                assert place.is_file()
                if fails:
                    raise ValueError
                (place.parent / "made").touch()
        except ValueError:
            pass
    made = ["new/er/made", "old/made"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == (
        [] if fails else made
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == (["old"] if fails else ["new", "old"])


def test_a_file_that_cannot_be_opened_ends_the_waiting(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(OSError, match="removed again and again"), file_lock(tmp_path / ".lock"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), file_lock(tmp_path / "file" / "folder" / ".lock"):
        pass
