"""Reader to batches: positions of the global order in, micro-batches of this rank out, the same number on every rank.

Global batch k of an epoch is positions [k B, (k + 1) B); the last one may be shorter. Each rank takes a contiguous share
of it, in pieces of at most max_micro_batch samples. All ranks get the same number of pieces: a rank that has no samples
left gets empty ones, so that no rank waits forever for another in a collective.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice, tee

import numpy as np
import torch
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.datasets.augment import Labels, Mixing, Normalize, Transform
from shardstep.datasets.augment.mixing import with_partners
from shardstep.datasets.order import Order, OrderConfig, Orders
from shardstep.datasets.parts import Part
from shardstep.datasets.reader import Reader
from shardstep.datasets.rng import AT_DECODING, Draws


@dataclass(frozen=True)
class MicroBatch:
    """The input of one rank's forward and backward pass."""

    images: Tensor  # float32 (batch, channels, height, width), normalised, on the device
    labels: Labels  # int64 (batch,), on the device; two for each image with mixup or cutmix
    positions: np.ndarray  # int64 (batch,), global positions in the epoch, on the host
    sample_ids: np.ndarray  # int64 (batch,), on the host; of the samples that took the place of bad ones, too


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step: `size` of them over all ranks, starting at `position` of `epoch`.

    `micro_batches` yields this rank's share; exhaust it before you ask for the next global batch.
    """

    epoch: int
    position: int
    size: int
    num_micro_steps: int
    micro_batches: Iterator[MicroBatch]


@dataclass(frozen=True)
class _Piece:
    """The positions of a micro-batch that is not read yet, and those to read: with the partners of mixup and cutmix."""

    epoch: int
    start: int
    stop: int
    read_start: int
    read_stop: int


def micro_pieces(size: int, rank: int, world_size: int, max_micro_batch: int) -> list[tuple[int, int]]:
    """Return this rank's share of a global batch of `size` samples: [start, stop) per micro-step, as many on every rank.

    10 samples on 3 ranks, at most 2 at a time: rank 0 takes (0, 2) (2, 3), rank 1 (3, 5) (5, 6), rank 2 (6, 8) (8, 10).
    """
    begin, end = size * rank // world_size, size * (rank + 1) // world_size
    largest = -(-size // world_size)  # the largest share of any rank
    step = max(1, min(max_micro_batch, largest))
    return [(min(begin + offset, end), min(begin + offset + step, end)) for offset in range(0, largest, step)]


@dataclass(eq=False)
class TrainBatches:
    """Endless batches of a training set, starting at any position."""

    reader: Reader
    order: OrderConfig | Orders
    global_batch_size: int  # over all ranks
    samples_per_epoch: int  # all samples, or fewer if the last batch is dropped
    rank: int
    world_size: int
    max_micro_batch: int  # samples of one rank in one pass, at most
    transforms: Sequence[Transform]
    normalize: Normalize
    memory_format: torch.memory_format  # of the images
    device: torch.device
    workers: int  # threads that read ahead; 0 reads in the calling thread
    mixing: Mixing | None = None
    part: Part | None = None  # that is trained on; needed by a reader that skips images which it cannot decode
    wait_s: float = field(default=0.0, init=False)  # waiting for data and preparing it; host time
    to_device_s: float = field(default=0.0, init=False)  # of wait_s: copying batches to the device
    skipped: list[tuple[int, int, int]] = field(default_factory=list, init=False)
    """Epoch, position and id of samples of this rank that others took the place of; whoever counts them empties it."""
    augment_s: float = field(default=0.0, init=False)  # of wait_s: transforming and normalizing them
    _epoch: int = field(default=-1, init=False)
    _epoch_order: Order | None = field(default=None, init=False)
    _announced: set[tuple[int, ...]] = field(default_factory=set, init=False)

    def from_position(self, epoch: int, position: int) -> Iterator[GlobalBatch]:
        """Yield global batches forever, starting at a position of an epoch."""
        ahead, planned = tee(self._plan(epoch, position))  # reading is ahead of the batches that are yielded
        pieces = (piece for batch in ahead for piece in self._pieces(*batch))
        reads = read_ahead(pieces, self._read, self.workers)
        for batch in planned:
            num_micro_steps = len(self._pieces(*batch))
            yield GlobalBatch(*batch, num_micro_steps, self._prepared(islice(reads, num_micro_steps)))

    def _plan(self, first_epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """Yield epoch, position and size of each global batch; no more, because tee() keeps up to 57 of them."""
        for epoch in count(first_epoch):
            for start in range(position, self.samples_per_epoch, self.global_batch_size):
                yield epoch, start, min(self.global_batch_size, self.samples_per_epoch - start)
            position = 0

    def _pieces(self, epoch: int, position: int, size: int) -> list[_Piece]:
        pieces = []
        for start, stop in micro_pieces(size, self.rank, self.world_size, self.max_micro_batch):
            first, last = with_partners(start, stop, size, self.mixing.distance) if self.mixing else (start, stop)
            pieces.append(_Piece(epoch, position + start, position + stop, position + first, position + last))
        return pieces

    def _read(self, piece: _Piece) -> Callable[[], tuple[_Piece, np.ndarray, np.ndarray, Tensor, Tensor]]:
        """Return a task that reads one piece. The ids are computed here: the order's cache belongs to one thread."""
        order = self._order_of(piece.epoch)
        sample_ids = order.slice(piece.read_start, piece.read_stop)
        for *lane, number in order.blocks(piece.read_start, piece.read_stop):
            for upcoming in ((*lane, number), (*lane, number + 1)):
                if upcoming not in self._announced:
                    self._announced.add(upcoming)
                    self.reader.will_need(order.shards_of(*upcoming))
        return lambda: (piece, sample_ids, *self._read_decodable(piece, sample_ids))

    def _read_decodable(self, piece: _Piece, sample_ids: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return ids, images and labels of samples, with the next sample in place of each whose image cannot be decoded.

        Which one that is depends on the sample alone, so it is the same on any number of ranks and after a resume.

        Raises:
            InputError: no image can be decoded.
        """

        def read(rows: np.ndarray) -> tuple[Tensor, Tensor]:
            draws = self._draws(piece, sample_ids, stream=AT_DECODING, rows=rows) if self.reader.takes_draws else None
            return self.reader.read(sample_ids[rows], draws)

        planned_ids, sample_ids = sample_ids, sample_ids.copy()
        images, labels = read(np.arange(len(sample_ids)))
        while self.reader.bad and len(rows := np.flatnonzero(np.isin(sample_ids, list(self.reader.bad)))):
            sample_ids[rows] = self._following(sample_ids[rows])
            if np.any(sample_ids[rows] == planned_ids[rows]):  # all the way round
                raise InputError("none of the training images can be decoded: `shardstep shards verify` says why")
            images[rows], labels[rows] = read(rows)
        return sample_ids, images, labels

    def _following(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the training sample after each of these, in the order of the ids; the first one after the last."""
        assert self.part is not None
        ids = self.part.ids
        if ids is None:
            return (sample_ids + 1) % self.part.samples
        return ids[(np.searchsorted(ids, sample_ids) + 1) % len(ids)]

    def _draws(
        self,
        piece: _Piece,
        sample_ids: np.ndarray,
        device: torch.device | None = None,
        stream: int = 0,
        rows: np.ndarray | slice = slice(None),
    ) -> Draws:
        """Return the draws of a piece's samples, or of some rows of them."""
        positions, ids = torch.arange(piece.read_start, piece.read_stop)[rows], torch.from_numpy(sample_ids[rows])
        return Draws(self.order.seed, piece.epoch, positions, ids, device, stream)

    def _order_of(self, epoch: int) -> Order:
        if epoch != self._epoch or self._epoch_order is None:
            self._epoch_order, self._epoch = self.order.of_epoch(epoch), epoch
            self._announced.clear()
        return self._epoch_order

    def _prepared(self, reads: Iterator[tuple[_Piece, np.ndarray, np.ndarray, Tensor, Tensor]]) -> Iterator[MicroBatch]:
        began = time.perf_counter()
        for piece, planned_ids, sample_ids, images, labels in reads:
            read = time.perf_counter()
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            on_device = time.perf_counter()
            images, mixed = self._augment(piece, sample_ids, images, labels)
            own = slice(piece.start - piece.read_start, piece.stop - piece.read_start)
            images = self.normalize(images[own]).contiguous(memory_format=self.memory_format)
            ready = time.perf_counter()
            bad = np.flatnonzero(planned_ids[own] != sample_ids[own])
            self.skipped += [(piece.epoch, piece.start + row, int(planned_ids[own][row])) for row in bad.tolist()]
            self.wait_s += ready - began
            self.to_device_s += on_device - read
            self.augment_s += ready - on_device
            yield MicroBatch(images, mixed[own], np.arange(piece.start, piece.stop), sample_ids[own])
            began = time.perf_counter()

    def _augment(self, piece: _Piece, sample_ids: np.ndarray, images: Tensor, labels: Tensor) -> tuple[Tensor, Labels]:
        if not (self.transforms or self.mixing):
            return images, labels
        draws = self._draws(piece, sample_ids, self.device)
        if len(images):
            for transform in self.transforms:
                images = transform(images, draws)
        return self.mixing(images, labels, draws) if self.mixing else (images, labels)


def test_batches(
    reader: Reader,
    ids: np.ndarray,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    normalize: Normalize,
    memory_format: torch.memory_format,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Yield images, labels and ids of this rank's samples to evaluate on: numbers rank, rank + world_size, ... of `ids`.

    Every rank yields the same number of batches, so that ranks can communicate between batches; a rank with one sample less
    ends with a shorter or empty batch.
    Samples whose images cannot be decoded are left out, if the reader skips them.
    """
    mine = ids[rank::world_size]
    largest = -(-len(ids) // world_size)
    parts = (mine[start : start + batch_size] for start in range(0, largest, batch_size))
    for chosen, images, labels in read_ahead(parts, lambda part: lambda: (part, *reader.read(part)), workers):
        if reader.bad and np.any(bad := np.isin(chosen, list(reader.bad))):
            chosen, images, labels = chosen[~bad], images[~bad], labels[~bad]
        pixels = normalize(images.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
        yield pixels, labels.to(device, non_blocking=True), chosen


def read_ahead(items: Iterator, task_of: Callable, workers: int) -> Iterator:
    """Yield the results of `task_of(item)()` in order; threads compute the next ones while the caller uses the last.

    An error in a task is raised when its result is due. Closing the iterator waits for the tasks that have begun.
    """
    if workers == 0:
        for item in items:
            yield task_of(item)()
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    pending: deque[Future] = deque()
    try:
        pending.extend(pool.submit(task_of(item)) for item in islice(items, 2 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(task_of(item)) for item in islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)
