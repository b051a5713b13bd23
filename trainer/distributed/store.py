"""Notes that processes exchange through the launcher's store, without collectives: heartbeats, reports of a preflight."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from shardstep.trainer.distributed.meeting import keeps_store, wait_for_store

_LOOK_AGAIN_S = 0.02


class HeartbeatStore:
    """The heartbeats of a world's ranks, and the verdict that one of them hangs. No call waits for another rank."""

    def __init__(self, world: PartialState):
        self.rank, self._world_size = world.process_index, world.num_processes
        self._store: dist.Store | None = None
        self._present: set[int] = set()  # ranks whose note has been seen
        self._own_verdict: str | None = None
        if self._world_size > 1:
            self._store = dist.PrefixStore("shardstep", dist.distributed_c10d._get_default_store())

    def exchange(self, note: str) -> dict[int, str]:
        """Leave this rank's note; return all ranks' notes on rank 0, and rank 0's and this rank's on the others.

        Makes two calls to the store, whatever the number of ranks, once each rank has left a note.
        """
        if self._store is None:
            return {0: note}
        try:
            self._store.set(f"note-{self.rank}", note)
        except RuntimeError:  # the rank or agent that keeps the store is gone: its end will be noticed elsewhere
            return {self.rank: note}
        return {self.rank: note} | self.read(range(self._world_size) if self.rank == 0 else [0])

    def read(self, ranks: Sequence[int] | None = None) -> dict[int, str]:
        """Return the notes of some ranks, by default all; ranks that have not left one yet are missing."""
        if self._store is None:
            return {}
        ranks = range(self._world_size) if ranks is None else ranks
        try:
            # Getting a note that is not there would wait for it. One that is there stays there.
            self._present |= {
                rank for rank in ranks if rank not in self._present and self._store.check([f"note-{rank}"])
            }
            present = [rank for rank in ranks if rank in self._present]
            notes = self._store.multi_get([f"note-{rank}" for rank in present]) if present else []
        except RuntimeError:
            return {}
        return {rank: text.decode() for rank, text in zip(present, notes, strict=True)}

    def claim_verdict(self, reason: str) -> bool:
        """Declare the run hung, unless another rank has; return whether this rank was the first."""
        self._own_verdict = reason
        if self._store is None:
            return True
        claim = f"{self.rank} {reason}"
        try:
            return self._store.compare_set("verdict", "", claim).decode() == claim
        except RuntimeError:
            return True

    def verdict(self) -> str | None:
        """Return the reason that the first rank gave for declaring the run hung; None if no rank has."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check(["verdict"]):
                return self._store.get("verdict").decode().partition(" ")[2]
        return self._own_verdict


class LaunchStore:
    """Notes between the processes of one launch, before a world comes up and when none does.

    The store at MASTER_ADDR and MASTER_PORT holds them; the launcher's agent keeps that store, or else rank 0 does.
    """

    def __init__(self, environment: Mapping[str, str], timeout_s: float):
        """
        Raises:
            TimeoutError: nothing listens there before the timeout.
            InputError: MASTER_ADDR does not resolve before it.
        """
        self._expected = int(environment.get("WORLD_SIZE", "1"))
        self._store: dist.Store | None = None
        self._keeps_store = False
        if self._expected > 1:
            store, self._keeps_store = _open_store(environment, timeout_s)
            self._store = dist.PrefixStore(f"meeting-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def share(self, topic: str, note: str, timeout_s: float) -> list[str]:
        """Leave a note and wait for the others'; return those that came in time, in the same order for all processes.

        A process that comes after the others have stopped waiting does not find its own note among them.

        Raises:
            RuntimeError: the process that keeps the store is gone.
        """
        if self._store is None:
            return [note]
        number = self._store.add(f"{topic}-count", 1)
        self._store.set(f"{topic}-{number}", note)
        deadline = time.monotonic() + timeout_s
        while not self._store.check([f"{topic}-closed"]):
            count = self._store.add(f"{topic}-count", 0)
            if count >= self._expected or time.monotonic() > deadline:
                self._store.compare_set(f"{topic}-closed", "", str(count))  # the first process closes the topic for all
            time.sleep(_LOOK_AGAIN_S)
        self._expected = count = int(self._store.get(f"{topic}-closed"))  # nobody waits for the others any more
        return [self._store.get(f"{topic}-{number}").decode() for number in range(1, count + 1)]

    def leave(self, timeout_s: float) -> None:
        """Wait for the others; the process that keeps the store leaves last.

        Raises:
            RuntimeError: that process is gone already.
        """
        self.share("leaving", "", timeout_s)
        if self._store is not None:
            left, deadline = self._store.add("left", 1), time.monotonic() + timeout_s
            while self._keeps_store and left < self._expected and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN_S)
                left = self._store.add("left", 0)


def _open_store(environment: Mapping[str, str], timeout_s: float) -> tuple[dist.Store, bool]:
    """Return the store, and whether this process keeps it."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    wait_for_store(environment, timeout_s)
    # multi_tenant: a world that comes up later can share the port
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False, "multi_tenant": True}
    if keeps_store(environment):
        with contextlib.suppress(dist.DistNetworkError):  # the port is taken, perhaps by another process with RANK=0
            return dist.TCPStore(address, port, is_master=True, **options), True
    return dist.TCPStore(address, port, is_master=False, **options), False
