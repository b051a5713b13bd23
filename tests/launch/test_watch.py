"""Watch a run by its folder: while it trains, when it starts again, and when it has ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardstep.launch.cli import run
from shardstep.launch.watch import Watched, main
from shardstep.trainer.run_dir import RunDir
from tests.distributed import HANG_S
from tests.launch.test_launch import BIN
from tests.runs import read_lines, train_ranks, write_recipe
from tests.trainer.monitoring.test_display import slowly


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps. Read only."""
    folder = tmp_path_factory.mktemp("watched")
    train_ranks(1, write_recipe(folder, shards))
    return folder / "run"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with the same times."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def age(path: Path, seconds: float) -> None:
    """Let a file be that old."""
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def rewrite_summary(folder: Path, **changes: object) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def watch(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = run(main, [str(folder), *options])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ("finished", 0, "the run finished"),
        ("preempted", 85, "was stopped, and can be resumed"),
        ("failed", 1, "the run failed"),
    ],
)
def test_a_run_that_has_ended(
    status: str, code: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_summary(folder, status=status)
    ended, shown, _ = watch(folder, capsys)
    assert ended == code
    assert shown.count("test loss") == 2  # both evaluations
    assert words in shown.splitlines()[-1]
    assert "step 8" in shown.splitlines()[-1]


def test_a_failure_is_shown_with_its_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_summary(folder, status="failed", failure="error", reason="a disk is gone\nand more", eval=None)
    assert watch(folder, capsys)[1].splitlines()[-1].endswith(": a disk is gone")


def test_once_shows_the_same_figures_as_the_run_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "summary.json").unlink()
    last = read_lines(folder / "metrics.jsonl")[-2]
    code, shown, _ = watch(folder, capsys, "--once")
    assert code == 0
    assert "100%  step 8/8  epoch 2" in shown
    assert f"loss {last['loss']:.4f}" in shown
    assert f"{last['memory_mb']:,} MB" in shown
    assert "saved step 8" in shown
    assert "test 100.00% (step 8)" in shown


def test_a_run_that_its_time_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "summary.json").unlink()
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    config.write_text(config.read_text().replace("max_wall_s: null", "max_wall_s: 80.0"))
    lines = [line | {"total_steps": None, "share_done": 0.25} for line in read_lines(metrics)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, shown, _ = watch(folder, capsys, "--once")
    assert "mlp, 80 s of training, or 2 epochs" in shown
    assert "25%  step 8  epoch 2" in shown


def test_a_run_before_its_first_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.yaml").touch()
    code, shown, _ = watch(folder, capsys, "--once")
    assert code == 0
    assert "starting" in shown
    assert "running" in shown


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", None, "holds no run: it has no config.yaml"),
        ("config.yaml", "", "config.yaml is incomplete: it has no model"),
        ("config.yaml", "model: {name: mlp", "cannot be read as YAML"),
        ("config.yaml", "train: {batch: 3}", "train.batch is not a key"),
        ("summary.json", '{"status": "fini', "summary.json is damaged"),
        ("summary.json", '{"status": "done", "step": 3}', "summary.json is damaged, or of another version"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": 1}\n', "older version of shardstep: its lines lack"),
        (
            "metrics.jsonl",
            '{"kind": "eval", "step": 1, "epoch": 1, "loss": 1, "accuracy": 1, "total_steps": 2, "time": 1}\n',
            "older version of shardstep: its lines lack train_accuracy, wall_s",
        ),
    ],
)
def test_a_folder_that_cannot_be_watched(
    name: str, content: str | None, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    code, _, message = watch(folder, capsys)
    assert code == 2
    assert expected in message
    assert message.count("\n") == 1


def test_there_is_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, message = watch(tmp_path / "nowhere", capsys)
    assert (code, message.count("\n")) == (2, 1)
    assert "there is no folder" in message


def test_a_summary_from_before_a_restart_is_not_believed(folder: Path) -> None:
    rewrite_summary(folder, status="preempted", step=8)
    age(folder / "summary.json", 100)
    age(folder / "metrics.jsonl", 100)
    (folder / "config.yaml").touch()
    watched = Watched(folder)
    assert watched.state(step=8) == "running"
    age(folder / "config.yaml", 50)
    assert (
        watched.state(step=8) == "preempted"
    )  # nobody is there, and it was not old for long: nothing came of the restart
    assert watched.state(step=9) == "killed"  # it went on, and left no summary


def test_silence_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shardstep.trainer.checkpoints.lock import hold

    (folder / "summary.json").unlink()
    for name in ("config.yaml", "metrics.jsonl"):
        age(folder / name, 200)
    assert "no process is running it" in watch(folder, capsys, "--once")[1]
    hold(folder, print)
    assert "no new metrics for 3 min" in watch(folder, capsys, "--once")[1]
    age(folder / "metrics.jsonl", 30)
    assert watch(folder, capsys, "--once")[1].splitlines()[-1] == "running"


def test_a_slow_run_is_not_called_silent(folder: Path) -> None:
    lines = folder / "metrics.jsonl"
    slow = [json.dumps(line | {"time": 1000.0 * place}) for place, line in enumerate(read_lines(lines))]
    lines.write_text("\n".join(slow) + "\n")
    watched = Watched(folder)
    watched.lines.new()
    assert watched.quiet_s() == 3000.0


def test_looking_does_not_keep_a_run_from_starting(folder: Path) -> None:
    """The lock is asked for in passing: a run that begins at that very moment looks again."""
    import fcntl
    import threading

    from shardstep.trainer.checkpoints.lock import LOCK_NAME, hold

    with (folder / LOCK_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        assert hold(folder, print)


def test_lines_are_followed_through_a_cut(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = read_lines(finished / "metrics.jsonl")[0]

    def text(*steps: int) -> str:
        return "".join(json.dumps(line | {"step": step}) + "\n" for step in steps)

    lines = RunDir(tmp_path).tail(begin_at="start")
    assert lines.new() == []
    path.write_text(text(1, 2) + text(3)[:20])  # a line that is still being written
    assert [found["step"] for found in lines.new()] == [1, 2]
    late = RunDir(tmp_path).tail(begin_at="end")
    with path.open("a") as file:
        file.write(text(3)[20:])
    assert [found["step"] for found in lines.new()] == [3]
    assert not lines.restarted
    (tmp_path / "other").write_text(text(1, 11, 12, 13))  # cut, and longer than before by now
    (tmp_path / "other").rename(path)
    assert [found["step"] for found in lines.new()] == [1, 11, 12, 13]
    assert lines.restarted
    assert late.new() == []
    with path.open("a") as file:
        file.write(text(14))
    assert [found["step"] for found in late.new()] == [14]


def test_torch_is_not_needed_to_watch(finished: Path) -> None:
    code = (
        "import sys; from shardstep.launch.watch import main; main([sys.argv[1], '--once'])\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, capture_output=True)


def test_a_real_run_is_followed_through_a_kill_to_its_end(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    command = [sys.executable, str(slowly(tmp_path, step_s=1)), str(recipe)]
    (tmp_path / "pause").touch()  # so that it is still at work when watchers are up

    def until(found: str, watcher: int = 0) -> None:
        shown, deadline = tmp_path / f"shown{watcher}", time.monotonic() + HANG_S
        while found not in shown.read_text():
            assert time.monotonic() < deadline, shown.read_text()
            time.sleep(0.1)

    run_process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.is_file() and len(read_lines(lines)) > 3):
        assert run_process.poll() is None
        time.sleep(0.05)
    watchers = []
    for number in range(2):
        with (tmp_path / f"shown{number}").open("w") as shown:
            command_line = [BIN / "shardstep", "watch", str(tmp_path / "run")]
            watchers.append(subprocess.Popen(command_line, stdout=shown, stderr=shown))
    for number in range(2):
        until("mlp, 2 epochs", number)
    time.sleep(1)  # what comes after the title
    watchers[1].send_signal(signal.SIGINT)
    assert watchers[1].wait(HANG_S) == 130
    until("the run continues", 1)
    assert run_process.poll() is None
    run_process.kill()
    run_process.wait()
    (tmp_path / "pause").unlink()
    until("no process is running it")
    assert watchers[0].poll() is None
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert watchers[0].wait(HANG_S) == 0
    until("started again, from step")
    until("the run finished: step 8")
