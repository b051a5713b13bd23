"""The global order of samples: a pure function of (seed, epoch, shard counts, lanes, window, order version).

    shards, permuted      [ shard 4 | shard 0 | shard 3 | shard 1 | shard 2 ]      one line of N samples
    lanes (L = 2)         [        lane 0         ][        lane 1          ]      cut at sample precision
    blocks (W = 2)        [   block 0    | block 1 ][   block 0    | block 1 ]     W shards each, inside a lane
    position p            lane p mod L, place p div L; the samples of a block are permuted

With one lane and the window `all`, all samples are shuffled together. With a window, reading touches L x W shards at a
time. Global batch k of an epoch is positions [k B, (k + 1) B), for any number of ranks.

How the samples of a block are permuted is all that differs between versions. Version 1 sorts random words, an exact
uniform permutation, for which the whole block must be computed. Version 2 does that for blocks of up to 65,536 samples
(fewer with several lanes), so that small data sets have the same order in both. A larger block is permuted by a cipher,
of which any part can be computed without the rest: a run starts anywhere within milliseconds, however large the epoch.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shardstep.configs.schema import OrderVersion
from shardstep.datasets.rng import permutation, permutation_part

if TYPE_CHECKING:
    from shardstep.datasets.sampling import Sampling

ORDER_VERSION: OrderVersion = 2  # of new runs; a run that was begun with version 1 keeps it
WINDOW_ALL_BYTES = 4 * 10**9  # data sets up to this size are shuffled completely
_CHUNK = 65_536  # positions, over all lanes, that are computed together; divided among them, but at least the following
_SMALLEST_CHUNK = 1024
# Streams of random numbers: the order of the shards, the order of the samples in a block, the cipher of a large block.
_SHARDS, _SAMPLES, _CIPHER = 0, 1, 2


def window_of(setting: int | str, total_bytes: int, num_shards: int) -> int | None:
    """Convert data.window_shards ("auto", "all" or a number) to a number of shards; None is all.

    "auto" depends only on the data set: as many shards as hold 4 GB.
    """
    if isinstance(setting, int):
        return setting
    if setting == "all" or total_bytes <= WINDOW_ALL_BYTES:
        return None
    return max(1, WINDOW_ALL_BYTES * num_shards // total_bytes)


class Order(Protocol):
    """The order of one epoch."""

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at the global positions [start, stop). int64, shape (stop - start,)."""
        ...

    def blocks(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """Return the blocks of the global positions [start, stop); the last number of a block counts on to the next one."""
        ...

    def shards_of(self, *block: int) -> list[int]:
        """Return the numbers of the shards of a block's samples; empty past the last block."""
        ...


class Orders(Protocol):
    """The orders of all epochs."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        ...

    def of_epoch(self, epoch: int) -> Order:
        """Return the order of one epoch."""
        ...


class EpochOrder:
    """The order of one epoch. Sample ids number the samples in the order of the manifest's shards, unless they are given."""

    def __init__(
        self,
        samples_per_shard: np.ndarray | list[int],
        seed: int,
        epoch: int,
        lanes: int = 1,
        window_shards: int | None = None,
        version: OrderVersion = ORDER_VERSION,
        ids: np.ndarray | None = None,
    ):
        """
        Args:
            samples_per_shard: in manifest order.
            epoch: from 0.
            lanes: L, at least 1; lanes beyond the number of samples are empty.
            window_shards: W, at least 1; None is all.
            version: 1 computes and keeps whole blocks, 2 only parts of large ones.
            ids: of the samples, int64, in the order of the shards; None numbers them from 0.
        """
        counts = np.asarray(samples_per_shard, dtype=np.int64)
        self.num_samples = int(counts.sum())
        self._key, self._lanes, self._ids = (seed, epoch), lanes, ids
        self._window_shards = window_shards or max(len(counts), 1)
        self._shard_order = permutation(len(counts), self._key, (_SHARDS, 0, 0))
        # The start of each shard in the manifest's order, and on the permuted line.
        self._first_id = np.concatenate([[0], np.cumsum(counts)])
        self._line = np.concatenate([[0], np.cumsum(counts[self._shard_order])])
        # For single places: a search in an array takes ten times as long.
        self._ends: list[int] = self._line.tolist()
        self._chunk_size = self.num_samples if version == 1 else max(_CHUNK // lanes, _SMALLEST_CHUNK)
        # A batch touches one chunk per lane, and the next batch mostly touches the same chunks.
        self._chunk = lru_cache(maxsize=lanes + 1)(self._permuted_chunk)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at the global positions [start, stop). int64, shape (stop - start,)."""
        assert 0 <= start <= stop <= self.num_samples, (start, stop, self.num_samples)
        ids = np.empty(stop - start, dtype=np.int64)
        for lane in range(min(self._lanes, self.num_samples)):
            first = start + (lane - start) % self._lanes  # the first position of this lane at or after start
            if first < stop:
                places = range(first // self._lanes, (stop - 1 - lane) // self._lanes + 1)
                ids[first - start :: self._lanes] = self._lane_slice(lane, places.start, places.stop)
        return ids if self._ids is None else self._ids[ids]

    def blocks(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """Return the (lane, block) pairs of the global positions [start, stop)."""
        found: list[tuple[int, ...]] = []
        for lane in range(min(self._lanes, self.num_samples)):
            first = start + (lane - start) % self._lanes
            if first < stop:
                begin = self._lane_start(lane)
                last = begin + (stop - 1 - lane) // self._lanes
                blocks = range(self._block_at(lane, begin + first // self._lanes), self._block_at(lane, last) + 1)
                found += [(lane, block) for block in blocks]
        return found

    def shards_of(self, *block: int) -> list[int]:
        """Return the manifest indices of the shards of a (lane, block)'s samples; empty past the lane's last block."""
        begin, end = self._block_bounds(*block)
        return self._shard_order[self._shard_at(begin) : self._shard_at(end - 1) + 1].tolist() if begin < end else []

    def _lane_slice(self, lane: int, start: int, stop: int) -> np.ndarray:
        begin = self._lane_start(lane)
        parts, place = [], begin + start
        while place < begin + stop:
            block = self._block_at(lane, place)
            block_begin, block_end = self._block_bounds(lane, block)
            chunk = (place - block_begin) // self._chunk_size
            chunk_begin = block_begin + chunk * self._chunk_size
            part_end = min(chunk_begin + self._chunk_size, block_end, begin + stop)
            parts.append(self._chunk(lane, block, chunk)[place - chunk_begin : part_end - chunk_begin])
            place = part_end
        return np.concatenate(parts)

    def _permuted_chunk(self, lane: int, block: int, chunk: int) -> np.ndarray:
        """Return the sample ids of a block's chunk, in their order."""
        begin, end = self._block_bounds(lane, block)
        size = end - begin
        if size <= self._chunk_size:
            return self._ids_at(np.arange(begin, end))[permutation(size, self._key, (_SAMPLES, lane, block))]
        first = chunk * self._chunk_size
        last = min(first + self._chunk_size, size)
        return self._ids_at(begin + permutation_part(first, last, size, self._key, (_CIPHER, lane, block)))

    def _ids_at(self, line: np.ndarray) -> np.ndarray:
        """Return the ids of the samples at these places of the line of permuted shards."""
        slots = np.searchsorted(self._line, line, side="right") - 1
        return self._first_id[self._shard_order[slots]] + line - self._line[slots]

    def _lane_start(self, lane: int) -> int:
        # The first N mod L lanes hold one sample more, so that position p = place x L + lane has no gaps.
        size, extra = divmod(self.num_samples, self._lanes)
        return lane * size + min(lane, extra)

    def _shard_at(self, place: int) -> int:
        return bisect_right(self._ends, place) - 1

    def _block_at(self, lane: int, place: int) -> int:
        return (self._shard_at(place) - self._shard_at(self._lane_start(lane))) // self._window_shards

    def _block_bounds(self, lane: int, block: int) -> tuple[int, int]:
        begin, end = self._lane_start(lane), self._lane_start(lane + 1)
        slot = self._shard_at(begin) + block * self._window_shards
        last = len(self._ends) - 1
        return max(begin, self._ends[min(slot, last)]), min(end, self._ends[min(slot + self._window_shards, last)])


@dataclass(frozen=True)
class OrderConfig:
    """The inputs of the global order of one data set. The number of ranks is not among them."""

    samples_per_shard: list[int]
    seed: int
    lanes: int
    window_shards: int | None
    version: OrderVersion = ORDER_VERSION
    ids: np.ndarray | None = None  # of the samples, int64, if these are a part of the data set
    sampling: "Sampling | None" = None  # what each epoch draws, in place of each sample once

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""
        counts, ids = self.samples_per_shard, self.ids
        if self.sampling is not None:
            drawn = self.sampling.of_epoch(epoch)
            counts, ids = drawn.samples_per_shard, drawn.ids
        return EpochOrder(counts, self.seed, epoch, self.lanes, self.window_shards, self.version, ids)
