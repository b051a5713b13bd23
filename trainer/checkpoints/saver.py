"""Checkpoints beside the training: one is written while the next steps are taken."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardstep.trainer.checkpoints import checkpoint, checkpoint_files
from shardstep.trainer.checkpoints.checkpoint import Snapshot

THREAD_NAME = "saver"


class Saver:
    """Writes snapshots in a thread, one at a time, on rank 0. A failure is told, and training goes on."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        warn: Callable[[str], None],
        best: dict[str, Any] | None = None,
        listeners: Sequence[Callable[[Path], None]] = (),
    ):
        """
        Args:
            folder: of the checkpoints.
            keep: how many of the newest stay.
            warn: told when one cannot be saved.
            best: step and score of the best evaluation so far, as TrainState has it.
            listeners: called, in the saver's thread, with each checkpoint that is whole and on disk.
        """
        self._folder, self._keep, self._warn, self._listeners = folder, keep, warn, listeners
        self._best_step = best["step"] if best else None  # of the best that is on disk
        self._thread: threading.Thread | None = None
        self._succeeded = True
        self.longest_s: float | None = None  # that a checkpoint has taken, from its copy on the host to the disk

    def save(self, snapshot: Snapshot, beat: Callable[[], None]) -> None:
        """Begin to write a snapshot; waits for the one before, and calls `beat` while it does."""
        self.wait(beat)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=THREAD_NAME)
        self._thread.start()

    def wait(self, beat: Callable[[], None]) -> bool:
        """Wait until nothing is being written; returns whether the last snapshot is safe on disk."""
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
        except Exception as error:  # a full disk, a mount that is gone: whatever it is, the next one may succeed
            self._succeeded = False
            self._warn(f"step {snapshot.step} could not be saved, training goes on: {error}")
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
