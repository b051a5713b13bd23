"""A heartbeat per rank, and an end to a run in which one has stopped.

When a rank hangs, all others wait for it in a collective, for as long as that may take. Here every rank tells the others
where it stands and since when, by a thread of its own; when one has not moved for too long, all write down their stacks,
one line says which rank stood where, and the run ends with a failure. Rank 0 watches all, all watch rank 0 and themselves.
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
from shardstep.trainer.stopping.stop_requests import StopRequest

FAILED = 1
_STOP_GRACE_S = 60.0  # without a movement, once a stop was asked for
_LAST_WORDS_S = 2.0  # for the other ranks to write their stacks


@dataclass(frozen=True)
class _Place:
    moves: int
    age_s: float
    name: str


class Watchdog:
    """Watches this rank and, through a board that all can read, the others."""

    def __init__(
        self,
        board: HeartbeatStore,
        folder: Path,
        timeout_s: float | None,
        request: StopRequest,
        tell: Callable[[str], None],
    ):
        """
        Args:
            board: where ranks leave their heartbeats.
            folder: of the run, for stacks.
            timeout_s: without a movement of any rank; None watches nothing.
            request: whose arrival leaves less time.
            tell: prints a line, on any rank.
        """
        self._board, self._folder, self._request, self._tell = board, folder, request, tell
        self._timeout_s = timeout_s
        self._step, self._phase, self._moved_s, self._moves = 0, "starting", time.monotonic(), 0
        self._longest_s = 0.0
        self._seen: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_s is not None:
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """This rank has come to a place; costs nothing."""
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._moved_s)
        self._step, self._phase, self._moved_s = step, phase, now
        self._moves += 1

    def watch(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """The same batch; this rank beats as it reads it and as it computes with it."""
        return dataclasses.replace(batch, micro_batches=self._watched(batch.micro_batches, step))

    def _watched(self, micro_batches: Iterator[MicroBatch], step: int) -> Iterator[MicroBatch]:
        self.beat(step, "reading data")
        for micro in micro_batches:
            self.beat(step, "computing")
            yield micro
            self.beat(step, "reading data")

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        beats = 0
        while not self._ended.wait(min(1.0, self._timeout_s / 5) if beats else 0):  # the first note comes at once
            beats += 1
            limit_s = self._timeout_s
            if self._request.has_come():
                limit_s = min(limit_s, max(_STOP_GRACE_S, 3 * self._longest_s))
            now = time.monotonic()
            mine: dict[str, Any] = {
                "beat": beats,
                "step": self._step,
                "phase": self._phase,
                "age_s": now - self._moved_s,
            }
            mine["moves"] = self._moves
            records = self._board.exchange(json.dumps(mine))
            found = {rank: self._read(rank, record, now) for rank, record in records.items()}
            if max(place.age_s for place in found.values()) > limit_s:
                everyone = self._board.read()
                self._end(found | {rank: self._read(rank, record, now) for rank, record in everyone.items()})
            if self._board.verdict():
                self._dump()

    def _read(self, rank: int, record: str, now: float) -> "_Place":
        """Where a rank stands, and for how long. A record that stays the same is that of a dead thread."""
        if rank not in self._seen or self._seen[rank][0] != record:
            self._seen[rank] = (record, now)
        content = json.loads(record)
        silent_s = now - self._seen[rank][1]
        return _Place(content["moves"], content["age_s"] + silent_s, f"{content['phase']}, step {content['step']}")

    def _end(self, found: dict[int, "_Place"]) -> None:
        """Say which rank stands still, once: all make the same moves, and the others wait for the one with the fewest."""
        stuck = min(found, key=lambda rank: (found[rank].moves, -found[rank].age_s))
        if self._board.claim_verdict():
            others = ", ".join(f"rank {rank}: {place.name}" for rank, place in sorted(found.items()) if rank != stuck)
            self._tell(
                f"failed: rank {stuck} has not moved for {found[stuck].age_s:.0f} s ({found[stuck].name})"
                + (f"; the others wait ({others})" if others else "")
                + f". The stacks of all ranks are in {self._folder}/hang-rank*.txt; the last checkpoint can be resumed from"
            )
        self._dump()

    def _dump(self) -> None:
        try:
            with (self._folder / f"hang-rank{self._board.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        time.sleep(_LAST_WORDS_S)
        os._exit(FAILED)  # the main thread may never come back from where it is
