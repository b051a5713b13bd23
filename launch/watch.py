"""Show the progress of a run, from its folder: on this machine, or on any that shares the file system.

    shardstep watch RUN_DIR           until the run has ended; Ctrl-C leaves the run alone
    shardstep watch RUN_DIR --once    its progress now

Exits with 0 when the run has finished, 85 when it was stopped, 1 when it failed.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from shardstep.configs.text import duration
from shardstep.launch.cli import FAILED, run_script
from shardstep.launch.entry import INTERRUPTED, STOPPED
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.status import describe_line, length
from shardstep.trainer.monitoring.wandb_tracker import sync_note
from shardstep.trainer.run_dir import State, modified_s, open_run_dir
from shardstep.trainer.stopping.stop_requests import STOP_FILE

_POLL_S = 1.0
# A run without a new line is reported after this time, or three times that between its last two lines if that is longer.
_QUIET_S = 60.0
_GRACE_S = 5.0  # without a new line before a summary from before a restart, or a lock that nobody holds, is believed
_CODES: dict[State, int] = {"finished": 0, "stopped": STOPPED, "preempted": STOPPED, "failed": FAILED}


def main(arguments: list[str]) -> int:
    """Watch a run; return the exit code that stands for its end."""
    parser = argparse.ArgumentParser(prog="shardstep watch", description="Show the progress of a run, from its folder.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--once", action="store_true", help="show its progress now, then exit")
    args = parser.parse_args(arguments)
    watched = Watched(args.run)
    display = Display(enabled=True)
    display.note(watched.title)
    try:
        return _show_once(watched, display) if args.once else _follow(watched, display)
    except KeyboardInterrupt:
        display.stop()
        print(
            f"no longer watching; the run continues. `touch {shlex.quote(str(args.run / STOP_FILE))}` saves and ends it",
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
    for line in watched.lines.new():  # of the past, print evaluations only
        display.status.take(line)
        if line["kind"] == "eval":
            display.note(describe_line(line))
    status = display.status
    display.start(status.total_steps, status.step, status.share_done)
    while True:
        lines = watched.lines.new()
        if watched.lines.restarted:
            status.forget()
            for line in lines:  # shown before
                status.take(line)
            display.note(f"started again, from step {status.step:,}")
        else:
            for line in lines:
                display.line(line)
        watched.find_checkpoint(display)
        state = watched.state(display.status.step)
        if state in _CODES:
            display.stop()
            display.note(watched.closing(state, display.status.step))
            if to_sync := sync_note(watched.run.path):
                display.note(to_sync)
            return _CODES[state]
        display.remark(*_remark(watched, state))
        time.sleep(_POLL_S)


def _remark(watched: "Watched", state: State) -> tuple[str, float]:
    """Return what to say about a run that makes no progress, and for how many seconds it has made none; else nothing."""
    silent_s = max(0.0, time.time() - max(map(modified_s, (watched.run.metrics_path, watched.run.config_path))))
    if state == "killed":
        return "no process is running it, and it left no summary: it was probably killed. No new metrics for", silent_s
    return ("no new metrics for", silent_s) if silent_s > watched.quiet_s() else ("", 0.0)


class Watched:
    """A run's folder, as seen by a process that only reads it."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: the folder is not that of a run, or this version cannot read it.
        """
        self.run, recipe = open_run_dir(folder)
        self.title = f"{folder}: {recipe.model.get('name')}, {length(recipe.train)}"
        self.lines = self.run.tail(begin_at="start")

    def state(self, step: int) -> State:
        """Return the state of the run; `step`: of its last line.

        Raises:
            InputError: its summary is damaged.
        """
        self.run.read_summary()
        return self.run.state(newest_step=step, grace_s=_GRACE_S)

    def closing(self, state: State, step: int) -> str:
        """Describe the end of a run that has ended."""
        summary = self.run.summary
        end = "was stopped, and can be resumed" if _CODES[state] == STOPPED else state
        text = f"the run {end}: step {summary.get('step', step):,} after {duration(summary.get('wall_s', 0.0))}"
        scores = summary.get("eval") or {}
        name, accuracy = ("mAP", scores["map"]) if "map" in scores else ("accuracy", scores.get("accuracy"))
        reason = summary.get("reason", "").partition("\n")[0] if state == "failed" else ""
        return text + (f", test {name} {accuracy:.2%}" if accuracy is not None else f": {reason}" if reason else "")

    def quiet_s(self) -> float:
        """Return the seconds without a line that are unusual for this run."""
        return max(_QUIET_S, 3 * self.lines.usual_gap_s())

    def find_checkpoint(self, display: Display) -> None:
        """Tell a display which checkpoint is the newest."""
        if found := self.run.checkpoints:
            display.saved(found[-1])


if __name__ == "__main__":
    run_script(main)
