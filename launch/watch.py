"""Show how a run is doing, from its folder: on this machine, or on any that shares the file system.

    shardstep watch RUN_DIR           until the run has ended; Ctrl-C leaves the run alone
    shardstep watch RUN_DIR --once    how it stands now

It ends with 0 when the run has finished, 85 when it was stopped, 1 when it failed.
"""

import argparse
import contextlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.text import duration
from shardstep.launch.cli import FAILED, INTERRUPTED, STOPPED
from shardstep.launch.cli import run as run_command
from shardstep.trainer.checkpoints.lock import is_held
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.metric_tail import MetricTail
from shardstep.trainer.monitoring.status import describe_line, length
from shardstep.trainer.monitoring.wandb_file import sync_note

_POLL_S = 1.0
_QUIET_S = (
    60.0  # without a new line before that is said, or three times what lay between the last two, if that is longer
)
_SETTLING_S = 5.0  # without a new line before a summary from before a restart, or a lock that nobody holds, is believed
_CODES = {"finished": 0, "preempted": STOPPED, "failed": FAILED}
_WORDS = {"finished": "finished", "preempted": "was stopped, and can go on", "failed": "failed"}

State = Literal["running", "finished", "preempted", "failed", "gone"]


def main(arguments: list[str]) -> int:
    """Watch a run; returns how it ended."""
    parser = argparse.ArgumentParser(prog="shardstep watch", description="Show how a run is doing, from its folder.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--once", action="store_true", help="show how it stands now, and end")
    args = parser.parse_args(arguments)
    watched = Watched(args.run)
    display = Display(enabled=True)
    display.note(watched.title)
    try:
        return _show_once(watched, display) if args.once else _follow(watched, display)
    except KeyboardInterrupt:
        display.stop()
        print(
            f"no longer watching; the run goes on. `touch {shlex.quote(str(args.run / 'STOP'))}` saves and ends it",
            file=sys.stderr,
        )
        return INTERRUPTED
    finally:
        display.stop()


def _show_once(watched: "Watched", display: Display) -> int:
    for line in watched.lines.new():
        display.status.take(line)
    watched.find_checkpoint(display)
    now_s = time.time()
    for text in (display.status.place(now_s).strip(), *display.status.rows(now_s)):
        display.note(text)
    state = watched.state(display.status.step)
    what, since_s = _remark(watched, state)
    if state in _CODES:
        display.note(watched.closing(state, display.status.step))
    else:
        display.note(f"{what} {duration(since_s)}" if what else "running")
    return 0


def _follow(watched: "Watched", display: Display) -> int:
    for line in watched.lines.new():  # those of the past: evaluations only
        display.status.take(line)
        if line["kind"] == "eval":
            display.note(describe_line(line))
    status = display.status
    display.start(status.total_steps, status.step, status.share_done)
    while True:
        lines = watched.lines.new()
        if watched.lines.begun_anew:
            display.status.forget()
            for line in lines:  # seen before
                display.status.take(line)
            display.note(f"started again, from step {display.status.step:,}")
        else:
            for line in lines:
                display.line(line)
        watched.find_checkpoint(display)
        state = watched.state(display.status.step)
        if state in _CODES:
            display.stop()
            display.note(watched.closing(state, display.status.step))
            if to_sync := sync_note(watched.folder):
                display.note(to_sync)
            return _CODES[state]
        display.remark(*_remark(watched, state))
        time.sleep(_POLL_S)


def _remark(watched: "Watched", state: State) -> tuple[str, float]:
    """What must be said of a run that has not ended, and since how many seconds: that nothing moves, if so."""
    silent_s = watched.silent_s()
    if state == "gone":
        return "no process is in this run, and it left no word: killed? No news for", silent_s
    if silent_s > watched.quiet_s():
        return "no news for", silent_s
    return "", 0.0


@dataclass
class _Summary:
    content: dict[str, Any]
    written_at_s: float


class Watched:
    """A run's folder, as seen by someone who only reads it."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: it is no run, or not one that this version can read.
        """
        self.folder, self._config = folder, folder / "config.yaml"
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is no folder")
        if not self._config.is_file():
            raise InputError(f"{folder} holds no run: it has no config.yaml")
        loaded = load_recipe(str(self._config))
        if loaded.problems:
            raise InputError(f"{self._config} is of another version of shardstep, or damaged: {loaded.problems[0]}")
        if not loaded.recipe.model:
            raise InputError(f"{self._config} is not whole: it names no model")
        recipe = loaded.recipe
        self.title = f"{folder}: {recipe.model.get('name')}, {length(recipe.train)}"
        self.lines = MetricTail(folder, begin_at="start")
        self._summary()

    def state(self, step: int) -> State:
        """Where the run is in its life; `step`: of its last line.

        A summary that is older than config.yaml, which every start writes, is from before a restart.
        """
        summary, begun_at_s = self._summary(), self._modified(self._config)
        if summary and summary.written_at_s >= begun_at_s:
            return summary.content["status"]
        if self.silent_s() < _SETTLING_S or is_held(self.folder):
            return "running"
        if summary and summary.content["step"] >= step:  # started again, with nothing to do
            return summary.content["status"]
        return "gone"

    def closing(self, state: str, step: int) -> str:
        """The last word about a run that has ended."""
        summary = self._summary()
        content = summary.content if summary else {}
        words = (
            f"the run {_WORDS[state]}: step {content.get('step', step):,} after {duration(content.get('wall_s', 0.0))}"
        )
        figures = content.get("eval") or {}
        if figures.get("accuracy") is not None:
            words += f", test accuracy {figures['accuracy']:.2%}"
        return words

    def silent_s(self) -> float:
        """Seconds since the run last wrote a line, or began."""
        return max(0.0, time.time() - max(self.lines.moved_at_s(), self._modified(self._config)))

    def quiet_s(self) -> float:
        """Seconds of silence that are more than this run's own pace."""
        return max(_QUIET_S, 3 * self.lines.usual_gap_s())

    def find_checkpoint(self, display: Display) -> None:
        """Let a display know the newest checkpoint."""
        found = [path for path in self.folder.glob("checkpoints/step-*") if path.name[5:].isdigit()]
        if found:
            display.saved(max(found))

    def _summary(self) -> _Summary | None:
        path = self.folder / "summary.json"
        try:
            content = json.loads(path.read_text())
            known = content["status"] in _CODES and content["step"] >= 0
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise InputError(f"{path} is damaged, or of another version of shardstep")
        return _Summary(content, self._modified(path))

    @staticmethod
    def _modified(path: Path) -> float:
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
        return 0.0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
