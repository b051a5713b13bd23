"""Write checkpoints in a thread, while training continues."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardstep.trainer.checkpoints import checkpoint, checkpoint_files
from shardstep.trainer.checkpoints.checkpoint import Snapshot

THREAD_NAME = "saver"


class Saver:
    """Writes snapshots in a thread, one at a time, on rank 0. After a failure it warns, and training continues."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        warn: Callable[[str], None],
        best: dict[str, Any] | None = None,
        listeners: Sequence[Callable[[Path], None]] = (),
    ):
        """`best` is TrainState's; `listeners` are called in the saver's thread with each checkpoint, once it is on disk."""
        self._folder, self._keep, self._warn, self._listeners = folder, keep, warn, listeners
        self._best_step = best["step"] if best else None  # of the best checkpoint on disk
        self._thread: threading.Thread | None = None
        self._succeeded = True
        self.longest_s: float | None = None  # the longest time from a snapshot to a checkpoint on disk

    def save(self, snapshot: Snapshot, beat: Callable[[], None]) -> None:
        """Begin to write a snapshot, after waiting for the one before; call `beat` while waiting."""
        self.wait(beat)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=THREAD_NAME)
        self._thread.start()

    def wait(self, beat: Callable[[], None]) -> bool:
        """Wait until nothing is being written, calling `beat`; return whether the last snapshot is safe on disk."""
        while self._thread:
            self._thread.join(timeout=1)
            beat()
            if not self._thread.is_alive():
                self._thread = None
        return self._succeeded

    def _write(self, snapshot: Snapshot) -> None:
        best, began = snapshot.facts["best"], time.monotonic()
        try:
            path = checkpoint.write(snapshot, self._folder)
            self.longest_s = max(self.longest_s or 0.0, time.monotonic() - began)
        except Exception as error:  # a full disk, a mount that is gone: whatever it is, the next checkpoint may succeed
            self._succeeded = False
            self._warn(f"step {snapshot.step} could not be saved, training continues: {error}")
            checkpoint_files.sweep(self._folder)
            return
        self._succeeded = True
        if best and best["step"] == snapshot.step:
            self._best_step = snapshot.step
        for listener in self._listeners:
            listener(path)
        try:
            checkpoint_files.prune(self._folder, self._keep, self._best_step)
        except OSError as error:
            self._warn(f"an old checkpoint could not be deleted: {error}")
