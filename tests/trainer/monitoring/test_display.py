"""What is shown of a run: calm and narrow on a terminal, plain lines everywhere else, and one voice for all ranks."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from datetime import datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from shardstep.trainer.monitoring.status import Status, describe_line
from tests.conftest import ROOT
from tests.distributed import HANG_S
from tests.runs import write_recipe

TRAIN = str(ROOT / "launch" / "train.py")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLUMNS = 80

LONGEST_TRAIN = {
    "kind": "train", "step": 1_234_567, "total_steps": 2_345_678, "epoch": 123.456, "loss": 12.34567, "accuracy": 0.98765,
    "lr": 0.000123456, "samples_per_s": 1_234_567.8, "data_wait_share": 0.9999, "memory_mb": 123_456,
    "left_s": 987_654.0, "time": 1000.0,
}  # fmt: skip
LONGEST_EVAL = {
    "kind": "eval", "step": 1_234_567, "total_steps": 2_345_678, "epoch": 123.456, "loss": 12.34567, "accuracy": 1.0,
    "train_accuracy": 1.0, "wall_s": 99_999.0, "time": 1000.0,
}  # fmt: skip


def test_rows_fit_a_terminal_of_80_columns() -> None:
    status = Status()
    assert status.place(0.0) == "starting"
    for line in (LONGEST_TRAIN, LONGEST_EVAL):
        status.take(line)
    status.saved(1_234_567, at_s=100.0)
    rows = status.rows(now_s=1000.0)
    assert len(rows) == 2
    assert max(map(len, rows)) <= COLUMNS
    assert len(status.place(1000.0)) <= COLUMNS - 10  # and a bar
    assert "saved step 1,234,567, 15 min ago" in rows[1]
    usual = {"step": 784, "total_steps": 784, "epoch": 4.0, "loss": 0.46671, "accuracy": 0.86834, "wall_s": 132.1}
    assert len(describe_line(LONGEST_EVAL | usual | {"train_accuracy": 0.86721})) <= COLUMNS


def test_time_left_runs_down_between_two_lines() -> None:
    status = Status()
    status.take(LONGEST_TRAIN | {"left_s": 90.0, "time": 1000.0})
    assert "80 s left" in status.place(1010.0)
    assert "0 s left" in status.place(2000.0)


def test_time_left_is_by_steps_where_they_are_known() -> None:
    """A run that other work slows down would come to 0 s by the clock."""
    status = Status()
    status.take(LONGEST_TRAIN | {"left_s": 60.0, "step": 20, "total_steps": 320, "time": 1000.0})
    status.step = 170
    assert "30 s left" in status.place(1100.0)


def test_a_run_that_its_time_ends_has_no_number_of_steps() -> None:
    status = Status()
    line = LONGEST_TRAIN | {"step": 1377, "total_steps": None, "share_done": 0.25, "left_s": 60.0}
    status.take(line)
    status.step += 1  # a step later
    assert status.place(1000.0) == " 25%  step 1,378  epoch 123.5  60 s left"
    assert "step 1377  " in describe_line(line)
    assert "/" not in describe_line(LONGEST_EVAL | {"step": 1377, "total_steps": None}).replace("images/s", "")


def test_what_is_not_known_is_left_out() -> None:
    line = LONGEST_TRAIN | {"loss": None, "accuracy": None, "skipped_steps": 1}
    status = Status()
    status.take(line)
    assert status.rows(0.0)[0] == "step skipped  lr 0.000123"
    assert "accuracy" not in describe_line(LONGEST_EVAL | {"accuracy": None})


def test_the_last_lines_of_a_run_that_diverged() -> None:
    status = Status()
    for line in (LONGEST_TRAIN, LONGEST_EVAL):
        assert "loss is NaN or infinite" in describe_line(line | {"loss": None, "accuracy": None})
        status.take(line | {"loss": None, "accuracy": None})
    assert "test loss is NaN or infinite" in status.rows(0.0)[0]


def slowly(folder: Path, step_s: float = 0.2) -> Path:
    """A script that trains, as the command does, at so many seconds a step; a file `pause` holds it at step 4."""
    path = folder / "slowly.py"
    path.write_text(
        "import os, sys, time\nfrom shardstep.launch.cli import leave, run\nfrom shardstep.launch.train import main\n"
        "from shardstep.trainer import loop\nfunction = loop.train_step\n"
        f"def step(run, batch):\n    time.sleep({step_s})\n"
        f"    while run.state.progress.step == 4 and os.path.exists({str(folder / 'pause')!r}):\n        time.sleep(0.1)\n"
        "    return function(run, batch)\n"
        "loop.train_step = step\nleave(run(main, sys.argv[1:]))\n"
    )
    return path


def in_terminal(command: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 80 columns."""
    here, there = pty.openpty()
    ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "RANK")}
    process = subprocess.Popen(
        command, stdout=there, stderr=there, stdin=there, env=variables | {"TERM": "xterm-256color"} | environment
    )
    os.close(there)
    written = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # its end
            break
        written += part
    os.close(here)
    assert process.wait(HANG_S) == 0, written.decode()
    return written.decode()


def test_a_terminal_has_a_live_area_that_leaves_no_trace(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    began = time.monotonic()
    output = in_terminal([sys.executable, str(slowly(tmp_path)), str(recipe)])
    took_s = time.monotonic() - began
    shown = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", output)]
    drawn = [line for line in shown if "━" in line]
    assert 3 <= len(drawn) <= 10 + 2 * took_s  # two a second, however many steps
    assert any(re.search(r"━ +\d+%  step \d/8  epoch \d[.\d]*  \d+ s left", line) for line in drawn)
    assert any(re.match(r"loss \d.* accuracy .* lr 0.05", line) for line in shown)
    assert any(re.match(r".*images/s  data wait \d+%  [\d,]+ MB  saved step \d, \d s ago", line) for line in shown)
    assert max(map(len, drawn)) <= COLUMNS
    head = shown[next(place for place, line in enumerate(shown) if line.startswith("  world")) :]
    assert any(line.startswith(13 * " ") for line in head)  # longer facts go on below
    assert all(len(line) <= COLUMNS or str(tmp_path) in line for line in head)
    assert not [line for line in shown if re.match(r"\d\d:\d\d:\d\d", line)]  # the lines of logs
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is there


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_is_not_to_be_drawn_on_gets_plain_lines(
    environment: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    output = in_terminal([sys.executable, TRAIN, str(write_recipe(tmp_path, shards))], **environment)
    assert "\x1b[" not in output.replace("\x1b[?25h", "")
    assert_plain(output)


def test_a_log_gets_plain_timed_lines_of_one_rank(shards: Path, tmp_path: Path) -> None:
    from tests.launch.test_launch import FORMS

    result = subprocess.run(
        [*FORMS["torchrun 2"], str(write_recipe(tmp_path, shards))],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env=os.environ | {"FORCE_COLOR": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b[2K" not in result.stdout
    assert_plain(result.stdout)


def assert_plain(output: str) -> None:
    lines = [ESCAPE.sub("", line).strip() for line in output.splitlines()]
    timed = [line for line in lines if re.match(r"\d\d:\d\d:\d\d  epoch", line)]
    # of 8 train lines the first, another one after each 10 s, and two evaluations: each once
    assert [line.split("  ")[1].split(" ")[1] for line in timed if "test loss" in line] == ["1", "2"]
    assert re.search(r"loss .*images/s  data wait \d+%  lr 0.05  step 1/8  \d+ MB  \d+ s left", timed[0])
    moments = [datetime.strptime(line[:8], "%H:%M:%S") for line in (timed[0], timed[-1])]
    assert 3 <= len(timed) <= 3 + (moments[1] - moments[0]).seconds // 10


def line_by_line(monkeypatch: pytest.MonkeyPatch, moments: list[float]) -> Callable[[list[dict[str, Any]]], None]:
    """Shows each line at its moment."""
    from shardstep.trainer.monitoring.display import Display

    display = Display(enabled=True)

    def show(lines: list[dict[str, Any]]) -> None:
        for line, moment in zip(lines, moments, strict=True):
            monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
            display.line(line)

    return show


def test_plain_lines_come_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = [100.0, 105.0, 109.9, 110.0, 119.0, 120.1]
    lines = [LONGEST_TRAIN | {"step": step} for step in range(len(moments))]
    line_by_line(monkeypatch, moments)(lines)
    shown = re.findall(r"step (\d+)/", capsys.readouterr().out)
    assert shown == ["0", "3", "5"]


def test_a_log_tells_how_far_training_is_before_figures_are_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shardstep.trainer.monitoring.display import Display

    display = Display(enabled=True)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    display.start(total_steps=100, done_steps=0, share_done=0.0)
    for step, moment in enumerate([5.0, 10.0, 20.0, 30.0, 31.0, 35.0, 41.0], start=1):
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
        display.advance(step)
        if step == 5:
            display.line(LONGEST_TRAIN | {"step": 5, "total_steps": 100})
    shown = re.findall(r"step (\d+)/100(  \d+ MB)?", capsys.readouterr().out)
    assert shown[:2] == [("2", ""), ("4", "")]
    assert shown[2][0] == "5"
    assert shown[3:] == [("7", "")]


def test_a_remark_is_made_once_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    from shardstep.trainer.monitoring.display import Display

    display = Display(enabled=True)
    for seconds in range(60, 65):
        display.remark("no news for", seconds)
    display.remark("")
    display.remark("no news for", 70)
    shown = [line[10:] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["no news for 60 s", "no news for 70 s"]
