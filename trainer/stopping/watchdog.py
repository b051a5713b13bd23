"""A heartbeat per rank, and an end to a run in which a rank hangs.

When a rank hangs, all others wait for it in a collective, possibly for hours. Here a thread of every rank publishes where
the rank is and since when. When a rank has not moved for too long, all ranks write down their stacks, one of them prints
which rank hangs and where the others wait, rank 0 writes the run's summary, and the processes exit with a failure. Rank 0
watches all ranks; the others watch rank 0 and themselves.
"""

import dataclasses
import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.datasets.batches import GlobalBatch, MicroBatch
from shardstep.trainer.distributed.store import HeartbeatStore
from shardstep.trainer.stopping.stop_requests import StopSignal

FAILED = 1
_STOP_GRACE_S = 60.0  # without a movement, after a stop request
_LAST_WORDS_S = 2.0  # for the other ranks to write their stacks, and for rank 0 to write the summary


@dataclass(frozen=True)
class _Place:
    moves: int
    age_s: float
    name: str


class Watchdog:
    """Watches this rank and, through a store that all ranks can read, the others."""

    def __init__(
        self,
        store: HeartbeatStore,
        folder: Path,
        timeout_s: float | None,
        stop_signal: StopSignal,
        tell: Callable[[str], None],
    ):
        """`timeout_s`: how long a rank may stand still, less once `stop_signal` has arrived; None watches nothing."""
        self._store, self._folder, self._stop_signal, self._tell = store, folder, stop_signal, tell
        self._timeout_s = timeout_s
        self._step, self._phase, self._moved_s, self._moves = 0, "starting", time.monotonic(), 0
        self._longest_s = 0.0
        self._seen: dict[int, tuple[str, float]] = {}
        # Called with the reason when a rank hangs, in a separate thread: the process exits even if it blocks.
        self.on_hang: Callable[[str], object] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_s is not None:
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Note where this rank is; costs nothing."""
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._moved_s)
        self._step, self._phase, self._moved_s = step, phase, now
        self._moves += 1

    def watch(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """Return the same batch, which beats when a micro-batch is read and when it is computed with."""
        return dataclasses.replace(batch, micro_batches=self._watched(batch.micro_batches, step))

    def _watched(self, micro_batches: Iterator[MicroBatch], step: int) -> Iterator[MicroBatch]:
        self.beat(step, "reading data")
        for micro in micro_batches:
            self.beat(step, "computing")
            yield micro
            self.beat(step, "reading data")

    def exit_if_hung(self) -> None:
        """If a rank has declared the run hung, wait until this process exits because of it."""
        if self._thread.is_alive() and self._store.verdict():
            self._thread.join()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        notes = 0
        while not self._ended.wait(min(1.0, self._timeout_s / 5) if notes else 0):  # the first note is left at once
            notes += 1
            limit_s = self._timeout_s
            if self._stop_signal.has_arrived():
                limit_s = min(limit_s, max(_STOP_GRACE_S, 3 * self._longest_s))
            now = time.monotonic()
            mine: dict[str, Any] = {"note": notes, "step": self._step, "phase": self._phase, "moves": self._moves}
            records = self._store.exchange(json.dumps(mine | {"age_s": now - self._moved_s}))
            found = {rank: self._read(rank, record, now) for rank, record in records.items()}
            if max(place.age_s for place in found.values()) > limit_s:
                everyone = self._store.read()
                self._accuse(found | {rank: self._read(rank, record, now) for rank, record in everyone.items()})
            verdict = self._store.verdict()
            if verdict:
                self._exit(verdict)

    def _read(self, rank: int, record: str, now: float) -> _Place:
        """Where a rank is, and for how long. A record that stays the same comes from a dead thread."""
        if rank not in self._seen or self._seen[rank][0] != record:
            self._seen[rank] = (record, now)
        content = json.loads(record)
        silent_s = now - self._seen[rank][1]
        return _Place(content["moves"], content["age_s"] + silent_s, f"{content['phase']}, step {content['step']}")

    def _accuse(self, found: dict[int, _Place]) -> None:
        """Find the rank that hangs and print it: all make the same moves, and the others wait for the one with the fewest."""
        stuck = min(found, key=lambda rank: (found[rank].moves, -found[rank].age_s))
        others = ", ".join(f"rank {rank}: {place.name}" for rank, place in sorted(found.items()) if rank != stuck)
        reason = (
            f"rank {stuck} has not moved for {found[stuck].age_s:.0f} s ({found[stuck].name})"
            + (f"; the others wait ({others})" if others else "")
            + f". The stacks of all ranks are in {self._folder}/hang-rank*.txt; the last checkpoint can be resumed from"
        )
        if self._store.claim_verdict(reason):
            self._tell(f"failed: {reason}")

    def _exit(self, reason: str) -> None:
        if self.on_hang:
            threading.Thread(target=self.on_hang, args=(reason,), daemon=True).start()
        try:
            with (self._folder / f"hang-rank{self._store.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        time.sleep(_LAST_WORDS_S)
        os._exit(FAILED)  # the main thread may never return from where it hangs
