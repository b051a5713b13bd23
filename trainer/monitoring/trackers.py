"""Send copies of metrics.jsonl to Weights & Biases and TensorBoard, on rank 0. A tracker may fail, never the run.

Each tracker has its own thread and queue: training waits for none. One that raises, falls too far behind, or does not
finish, is dropped with one warning; metrics.jsonl has everything.
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

_START_S = 100.0  # to start; wandb gives up after 90 s without its server
_FINISH_S = 30.0  # without progress, to empty its queue and to close
_FINISH_AT_MOST_S = 120.0
_SEND_AT_MOST_S = 600.0  # instead of both, where a finished run sends files to a server
_MOST_WAITING = 10_000  # lines


class Tracker(Protocol):
    """A destination for a copy of a run's metrics. All calls come from one thread; a tracker that raises is dropped."""

    name: str
    sends_files: bool
    """Whether it sends files of the run to a server, which may take minutes at the end."""

    def start(self) -> None:
        """Open it; metrics.jsonl ends where the run resumes."""

    def catch_up(self) -> None:
        """Send the lines of earlier starts that it lacks."""

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl."""

    def saved(self, path: Path) -> None:
        """Send a complete checkpoint, or do nothing."""

    def finish(self, summary: Line, failed: bool) -> None:
        """Send the results of the run, and close."""

    def note(self) -> str:
        """Return a line for the user at the end; empty for nothing."""


class Background:
    """A tracker in its own thread."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]):
        """Start the tracker, and wait for that for a limited time. `warn` gets one message if it is dropped."""
        self.tracker, self._warn = tracker, warn
        self._dropped = False
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_S):
            self._drop(f"has not started after {_START_S:.0f} s")

    def put(self, action: Callable[[], None]) -> None:
        """Queue an action for the tracker's thread. Returns at once."""
        if self._waiting.qsize() >= _MOST_WAITING:
            self._drop(f"no longer takes lines, {_MOST_WAITING:,} are waiting")
        if not self._dropped:
            self._waiting.put(action)

    def end(self, tell: Callable[[str], None], may_send: Callable[[], bool]) -> None:
        """Wait until the queue is empty; drop a tracker that makes no progress for too long.

        `tell` gets one message that files are being sent, if that takes long; `may_send`: whether to wait for that.
        """
        self._waiting.put(None)
        began = moved = time.monotonic()
        size, has_told = self._waiting.qsize(), False
        while self._thread.is_alive() and not self._dropped:
            self._thread.join(timeout=0.2)
            now = time.monotonic()
            if self._waiting.qsize() != size:
                size, moved = self._waiting.qsize(), now
            if now - moved <= _FINISH_S and now - began <= _FINISH_AT_MOST_S:
                continue
            if not self.tracker.sends_files or now - began > _SEND_AT_MOST_S or not may_send():
                self._drop(f"has not finished after {now - began:.0f} s")
            elif not has_told:
                tell(f"sending files to {self.tracker.name}; Ctrl-C ends it")
                has_told = True

    def note(self) -> str:
        """Return the tracker's line for the user, or nothing if it fails."""
        try:
            return self.tracker.note()
        except Exception as error:
            self._warn(f"{self.tracker.name} failed ({error}) after the run; metrics.jsonl has everything")
            return ""

    def _work(self) -> None:
        try:
            self.tracker.start()
            self._started.set()
            self.tracker.catch_up()
            while not self._dropped and (action := self._waiting.get()):
                action()
        except Exception as error:  # whatever a tracker raises, training continues
            self._drop(f"failed ({error})")
        finally:
            self._started.set()

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            self._warn(f"{self.tracker.name} {why}, and gets no more lines; metrics.jsonl has everything")


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
            warn: gets a message about each that is dropped.
            tell: gets a message about what the run waits for at the end.
            stop_requested: whether this process must end soon.
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
        """Close all with the run's summary; return their lines for the user."""
        for one in self._all:
            one.put(lambda tracker=one.tracker: tracker.finish(summary, failed))  # type: ignore[misc]
        for one in self._all:
            one.end(self._tell, lambda: summary["status"] == "finished" and not self._stop_requested())
        return [note for one in self._all if (note := one.note())]


def start_trackers(
    recipe: Recipe,
    folder: Path,
    metrics: Path,
    model_files: list[Path],
    state: TrainState,
    facts: Callable[[], Line],
    warn: Callable[[str], None],
    tell: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> Trackers:
    """Start the trackers of the recipe's log section. Called on rank 0, when metrics.jsonl is cut to where the run resumes.

    Args:
        metrics: the run's metrics.jsonl.
        model_files: that a finished run leaves, for the artifact of the model.
        state: has the id in Weights & Biases of a resumed run, or gets that of a new one.
        facts: returns the facts of code and hardware that go with the config; called if they are needed.
        warn, tell, stop_requested: as in Trackers.
    """
    trackers: list[Tracker] = []
    if recipe.log.tensorboard:
        trackers.append(TensorBoardTracker(recipe, folder, metrics, facts()))
    if recipe.log.wandb != "disabled":
        trackers.append(WandbTracker(recipe, folder, metrics, model_files, facts(), state.wandb_id))
    started = Trackers(trackers, warn, tell, stop_requested)
    for tracker in trackers:
        if isinstance(tracker, WandbTracker):
            state.wandb_id = tracker.run_id
    return started
