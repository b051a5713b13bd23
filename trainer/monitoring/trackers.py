"""Copies of metrics.jsonl for Weights & Biases and TensorBoard, on rank 0. A tracker may fail, never the run.

Each works in a thread of its own, behind a queue: training waits for none. One that raises, that lets too much pile up, or
that does not come to its end, is left out with one warning; metrics.jsonl has everything.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from shardstep.configs.schema import Recipe
from shardstep.trainer.monitoring.tensorboard_tracker import TensorBoardTracker
from shardstep.trainer.monitoring.wandb_tracker import WandbTracker
from shardstep.trainer.state import TrainState

Line = dict[str, Any]

_START_S = 100.0  # to begin; wandb gives up after 90 s without its server
_FINISH_S = 30.0  # without a movement, to take what waits and to close
_FINISH_AT_MOST_S = 120.0
_SEND_AT_MOST_S = 600.0  # instead of both, where a finished run's files are on their way to a server
_MOST_WAITING = 10_000  # lines


class Tracker(Protocol):
    """Where a copy of a run's figures goes. Called in one thread; whatever it raises, it is left out."""

    name: str
    sends_files: bool
    """Whether files of the run go to a server, which may take minutes at its end."""

    def start(self) -> None:
        """Open it; metrics.jsonl ends where the run goes on."""

    def catch_up(self) -> None:
        """Send what it should have of the run's past, and has not."""

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl."""

    def saved(self, path: Path) -> None:
        """Send a checkpoint that is whole, if it wants it."""

    def finish(self, summary: Line, failed: bool) -> None:
        """Send what the run has left behind, and close."""

    def note(self) -> str:
        """What the person should know at the end, in a line; empty for nothing."""


class Background:
    """A tracker in a thread of its own."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]):
        """Start the tracker; waits for that, but not for ever. `warn` is told once if it is left out."""
        self.tracker, self._warn = tracker, warn
        self._left_out = False
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_S):
            self._leave_out(f"has not started after {_START_S:.0f} s")

    def put(self, action: Callable[[], None]) -> None:
        """Let the tracker's thread do something when it has time. Returns at once."""
        if self._waiting.qsize() >= _MOST_WAITING:
            self._leave_out(f"takes nothing any more, {_MOST_WAITING:,} lines wait for it")
        if not self._left_out:
            self._waiting.put(action)

    def end(self, tell: Callable[[str], None], may_send: Callable[[], bool]) -> None:
        """Wait until all is done; one that stands still for too long is left behind.

        Args:
            tell: told once that files are being sent, if that takes long.
            may_send: whether that may still go on.
        """
        self._waiting.put(None)
        began = moved = time.monotonic()
        size, told = self._waiting.qsize(), False
        while self._thread.is_alive() and not self._left_out:
            self._thread.join(timeout=0.2)
            now = time.monotonic()
            if self._waiting.qsize() != size:
                size, moved = self._waiting.qsize(), now
            if now - moved <= _FINISH_S and now - began <= _FINISH_AT_MOST_S:
                continue
            if not self.tracker.sends_files or now - began > _SEND_AT_MOST_S or not may_send():
                self._leave_out(f"has not finished after {now - began:.0f} s")
            elif not told:
                tell(f"sending files to {self.tracker.name}; Ctrl-C ends it")
                told = True

    def _work(self) -> None:
        try:
            self.tracker.start()
            self._started.set()
            self.tracker.catch_up()
            while not self._left_out and (action := self._waiting.get()):
                action()
        except Exception as error:  # whatever a tracker raises, training goes on
            self._leave_out(f"failed ({error})")
        finally:
            self._started.set()

    def _leave_out(self, why: str) -> None:
        if not self._left_out:
            self._left_out = True
            self._warn(f"{self.tracker.name} {why}, and is left out from here on; metrics.jsonl has everything")


class Trackers:
    """All trackers of a run, each in the background."""

    def __init__(
        self,
        trackers: list[Tracker],
        warn: Callable[[str], None],
        tell: Callable[[str], None],
        stop_requested: Callable[[], bool],
    ):
        """
        Args:
            trackers: to start.
            warn: told of each that is left out.
            tell: told of what the person waits for at the end.
            stop_requested: whether this process is to end soon, and must not wait for long.
        """
        self._all = [Background(tracker, warn) for tracker in trackers]
        self._tell, self._stop_requested = tell, stop_requested

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl to all."""
        for one in self._all:
            one.put(lambda tracker=one.tracker: tracker.log(line))  # type: ignore[misc]

    def saved(self, path: Path) -> None:
        """Offer a checkpoint to all."""
        for one in self._all:
            one.put(lambda tracker=one.tracker: tracker.saved(path))  # type: ignore[misc]

    def finish(self, summary: Line, failed: bool = False) -> list[str]:
        """Close all with the run's summary; returns what the person should know of them."""
        for one in self._all:
            one.put(lambda tracker=one.tracker: tracker.finish(summary, failed))  # type: ignore[misc]
        for one in self._all:
            one.end(self._tell, lambda: summary["status"] == "finished" and not self._stop_requested())
        return [note for one in self._all if (note := one.tracker.note())]


def start_trackers(
    recipe: Recipe,
    folder: Path,
    state: TrainState,
    facts: Callable[[], Line],
    warn: Callable[[str], None],
    tell: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> Trackers:
    """Start what the recipe's log section asks for. Called on rank 0, when metrics.jsonl is cut to where the run goes on.

    Args:
        recipe: of the run.
        folder: of the run.
        state: has the id in Weights & Biases of the run that goes on, or gets it.
        facts: of code and hardware, for what is kept beside the recipe; asked if it is needed.
        warn, tell, stop_requested: as in Trackers.
    """
    trackers: list[Tracker] = []
    if recipe.log.tensorboard:
        trackers.append(TensorBoardTracker(recipe, folder, facts()))
    if recipe.log.wandb != "disabled":
        trackers.append(WandbTracker(recipe, folder, facts(), state.wandb_id))
    started = Trackers(trackers, warn, tell, stop_requested)
    for tracker in trackers:
        if isinstance(tracker, WandbTracker):
            state.wandb_id = tracker.run_id
    return started
