"""How often the samples of a part come in an epoch: strata of samples that come alike, each walked through in turn.

    strata, shuffled within   ( b d a )( f c g e )     a ring each, fixed by the seed
    an epoch of D draws       a quota of each stratum: D x its share, rounded down or up; the quotas sum to D
    what it draws             the next places of each ring, from where the last epoch ended

A stratum is a class, or the samples of one weight. In every epoch, and over all epochs so far, the counts of two samples of
a stratum differ by at most one: none comes again before all have come. The draws of an epoch are sorted by shard, and
order.py shuffles them as it shuffles a data set, window by window, so that no other shards are read than without.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardstep.configs.components import neighbours
from shardstep.configs.errors import InputError
from shardstep.configs.selection import ClassWeights, WeightTable
from shardstep.configs.text import count, listed
from shardstep.datasets.label_sets import strata
from shardstep.datasets.order import Order, Orders
from shardstep.datasets.parts import Part
from shardstep.datasets.rng import GOLDEN, WORD, derived_seed, philox_words
from shardstep.datasets.sources.tables import read_table

_STREAM = 4  # of random numbers: beside those in order.py and parts.py
_OFFSET_BITS = 20  # few enough that a sum of an offset and a number of draws is exact to 2**-20


@dataclass(frozen=True)
class Strata:
    """The samples of a part, sorted into strata, and the weights of these."""

    of_sample: np.ndarray  # int64 (samples of the part,): the number of each sample's stratum
    weights: np.ndarray  # float64 (strata,), relative: the share of a stratum, however many samples it has
    digest: str = ""  # SHA-256 of the weights, where they come from a file

    @property
    def are_drawn(self) -> bool:
        """Whether any of the samples is drawn."""
        return bool(self.weights[self.of_sample].any())

    def of_samples(self, numbers: slice) -> "Strata":
        """Return the strata of some of the part's samples only."""
        return Strata(self.of_sample[numbers], self.weights)


class Sampling:
    """What each epoch draws from a part."""

    def __init__(self, part: Part, strata: Strata | None, draws: int, seed: int):
        """
        Args:
            strata: of the part's samples, at least one with a weight above 0; None makes all one stratum.
            draws: number of draws in an epoch.
        """
        ids, self._shards = part.all_ids(), part.shards
        alike = np.zeros(len(ids), dtype=np.int64) if strata is None else strata.of_sample
        weights = np.ones(1) if strata is None else strata.weights / strata.weights.max()
        self._ring = ids[np.lexsort((philox_words(len(ids), (seed, 0), (0, 0, _STREAM)), alike))]
        self._sizes = np.bincount(alike, minlength=len(weights))
        self._first = np.cumsum(self._sizes) - self._sizes
        # The strata's lengths on a line of `draws`; cumsum adds in one order on every machine, which sum does not.
        ends = np.cumsum(np.where(self._sizes > 0, weights, 0.0))
        self._ends = ends * draws / ends[-1]
        self._draws, self._phase = draws, derived_seed(seed, _STREAM)
        self._passed = (0, np.zeros(len(weights), dtype=np.int64))  # an epoch, and each stratum's draws before it

    def of_epoch(self, epoch: int) -> Part:
        """Return what an epoch draws, as a part of the data set; a sample that is drawn again is in it again."""
        quotas, passed = self.quotas(epoch), self._draws_before(epoch)
        stratum = np.repeat(np.arange(len(quotas)), quotas)
        turn = np.arange(self._draws) - (np.cumsum(quotas) - quotas)[stratum]
        place = (passed[stratum] + turn) % self._sizes[stratum]
        return Part(self._shards, np.sort(self._ring[self._first[stratum] + place]))

    def quotas(self, epoch: int) -> np.ndarray:
        """Return the number of draws from each stratum. int64, shape (strata,), their sum is `draws`.

        Systematic sampling (Madow 1949): points at distance 1 on the line of strata. Their offset moves by the golden ratio
        from epoch to epoch, so that over some epochs the rounding evens out.
        """
        offset = (self._phase + epoch * GOLDEN) % WORD >> (64 - _OFFSET_BITS)
        ends = np.floor(self._ends + offset / 2**_OFFSET_BITS).astype(np.int64)
        ends[self._ends == self._ends[-1]] = self._draws  # the last stratum that is drawn, and what follows it
        return np.diff(ends, prepend=0)

    def _draws_before(self, epoch: int) -> np.ndarray:
        """Return how often each stratum was drawn in all epochs before this one. int64, shape (strata,)."""
        if self._sizes.max() == 1:  # rings of one sample begin anywhere
            return np.zeros_like(self._sizes)
        known, passed = self._passed if self._passed[0] <= epoch else (0, np.zeros_like(self._sizes))
        for earlier in range(known, epoch):
            passed = passed + self.quotas(earlier)
        self._passed = (epoch, passed)
        return passed


def strata_of(part: Part, setting: ClassWeights | WeightTable | None) -> Strata | None:
    """Return the strata of data.sampling; None if each sample comes equally often.

    Raises:
        InputError: a weight is missing, of something that does not exist, or all are 0.
    """
    if isinstance(setting, WeightTable):
        return _by_sample(part, setting)
    return None if setting is None else _by_class(part, setting)


def _by_class(part: Part, setting: ClassWeights) -> Strata:
    classes, path = part.manifest.classes, part.shards.path
    # Of several labels, the rarest is the class; samples without a label are one more.
    labels, without = strata(part.labels), len(classes)
    labels = np.where(labels < 0, without, labels)
    weights = np.array([*(setting.weights.get(name, 1.0) for name in classes), 1.0])
    present = np.bincount(labels, minlength=len(weights)) > 0
    problems = [
        f"{path} has no class {listed([name])}; {neighbours(name, classes)}"
        for name in setting.weights
        if name not in classes
    ]
    empty = [name for name, found in zip(classes, present, strict=False) if not found and setting.weights.get(name)]
    if empty:
        problems.append(f"{path} has nothing of {listed(empty)} to train on: leave the weight out, or give 0")
    if not weights[present].any():
        problems.append(f"the weights of all classes that {path} has samples of are 0")
    if problems:
        raise InputError.from_problems("data.sampling", problems)
    return Strata(labels, weights)


def _by_sample(part: Part, table: WeightTable) -> Strata:
    path = Path(table.path).expanduser()
    try:
        weights = _array(path) if path.suffix == ".npy" else _weights_by_key(part, path, table.column)
    except OSError as error:
        raise InputError(f"data.sampling: {path} cannot be read: {error.strerror or error}") from None
    if weights.shape != (part.manifest.samples,):
        raise InputError(
            f"data.sampling: {path} must have one weight for each of the {part.manifest.samples:,} samples of "
            f"{part.shards.path}, in its order; its shape is {weights.shape}"
        )
    weights = weights.astype(np.float64)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"data.sampling: {path} has {count(int(wrong.sum()), 'weight')} that are no numbers from 0, such as "
            f"{weights[first]} for {part.shards.key(first)}"
        )
    digest = hashlib.sha256(weights.tobytes()).hexdigest()
    of_part = weights if part.ids is None else weights[part.ids]
    values, alike = np.unique(of_part, return_inverse=True)
    if not values.any():
        raise InputError(f"data.sampling: the weights of all samples to train on are 0 in {path}")
    return Strata(alike.astype(np.int64), values / values.max() * np.bincount(alike), digest)


def _array(path: Path) -> np.ndarray:
    try:
        weights = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"data.sampling: {path} is no array of numbers: {error}") from None
    if weights.dtype.kind not in "iuf":
        raise InputError(f"data.sampling: {path} must hold numbers, not {weights.dtype}")
    return weights


def _weights_by_key(part: Part, path: Path, column: str) -> np.ndarray:
    """Return the weights of all samples of a part's data set, from a table that names them by their keys."""
    columns, own = read_table(path, path.read_bytes()).columns, part.shards.keys()
    lacks = [name for name in ("key", column) if name not in columns]
    if lacks:
        raise InputError(
            f"data.sampling: {path} has no column {listed(lacks)}, only {listed(list(columns))}. It needs `key`, as "
            f"`shardstep shards order` prints it, and the weight: `weight`, or the column that data.sampling names"
        )
    times = Counter(map(str, columns["key"]))
    for found, what in (
        ([key for key in times if times[key] > 1], "twice or more"),
        ([key for key in own if key not in times], "not at all"),
        (sorted(set(times) - set(own)), f"which {part.shards.path} does not have"),
    ):
        if found:
            raise InputError(
                f"data.sampling: {path} must have one weight for each sample of {part.shards.path}, but has "
                f"{count(len(found), 'key')} {what}: {listed(found, most=3)}"
            )
    weights = {}
    for key, value in zip(columns["key"], columns[column], strict=True):
        try:
            weights[str(key)] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"data.sampling: {path}: the weight of {key} is no number: {value!r}") from None
    return np.array([weights[key] for key in own])


@dataclass(frozen=True)
class RepeatedOrders:
    """Orders in which each sample comes several times in a row: position p has the sample at p div repeats of `once`."""

    once: Orders
    repeats: int

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.once.seed

    def of_epoch(self, epoch: int) -> "RepeatedOrder":
        """Return the order of one epoch."""
        return RepeatedOrder(self.once.of_epoch(epoch), self.repeats)


@dataclass(frozen=True)
class RepeatedOrder:
    """The order of one epoch in which each sample comes several times in a row."""

    once: Order
    repeats: int

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at the global positions [start, stop). int64, shape (stop - start,)."""
        first, last = self._places(start, stop)
        skipped = start - first * self.repeats
        return np.repeat(self.once.slice(first, last), self.repeats)[skipped : skipped + stop - start]

    def blocks(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """Return the blocks of the global positions [start, stop)."""
        return self.once.blocks(*self._places(start, stop))

    def shards_of(self, *block: int) -> list[int]:
        """Return the numbers of the shards of a block's samples; empty past the last block."""
        return self.once.shards_of(*block)

    def _places(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.repeats, -(-stop // self.repeats)
