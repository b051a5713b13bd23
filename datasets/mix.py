"""Several data sets as one: their shards side by side, and whose turn it is at each position of the global order.

    positions of the run    A B A A B A A B A A ...     each prefix has the shares of the sets, to within two samples
    set A                   its own order, epoch by epoch of A; so has set B

Whose turn it is depends on the weights alone. Position p of epoch e counts from the start of the run, so the shares go on
over the ends of epochs, and so does each set's walk through its own epochs.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shardstep.configs.components import neighbours
from shardstep.configs.errors import InputError
from shardstep.configs.text import listed
from shardstep.datasets.label_sets import LabelSets, samples_per_class
from shardstep.datasets.manifest import (
    CHANNELS,
    FORMAT_VERSION,
    SEVERAL_LABELS_VERSION,
    Manifest,
    ShardFolder,
    check_same_kind,
)
from shardstep.datasets.order import Order, Orders
from shardstep.datasets.parts import Part

_MOST_PARTS = 2**31  # of the sum of all weights: products of two of them are exact in 64 bits
_ROUNDED_PARTS = 2**30


@dataclass(frozen=True)
class MixedShards(ShardFolder):
    """Several open data sets as one: samples and shards are numbered through, and labels are those of one list of classes."""

    sets: tuple[ShardFolder, ...] = ()

    @cached_property
    def first_shards(self) -> list[int]:
        """The number of each set's first shard, and of all shards."""
        return np.cumsum([0, *(len(one.manifest.shards) for one in self.sets)]).tolist()

    @cached_property
    def first_ids(self) -> list[int]:
        """The id of each set's first sample, and the number of all samples."""
        return np.cumsum([0, *(one.manifest.samples for one in self.sets)]).tolist()

    @property
    def strata(self) -> np.ndarray:
        """The set and class of each sample, as one number. int64, shape (samples,)."""
        of_sets = np.repeat(np.arange(len(self.sets)), np.diff(self.first_ids))
        return super().strata + (1 + len(self.manifest.classes)) * of_sets  # 1 for samples without a label

    def shard_path(self, shard: int) -> Path:
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self.sets[number].shard_path(shard - self.first_shards[number])

    def key(self, sample_id: int) -> str:
        """Return the folder of a sample's set and its key there: sets may have the same keys."""
        return f"{self.path_of(sample_id).parent}/{super().key(sample_id)}"


def mix_shards(sets: Sequence[ShardFolder]) -> MixedShards:
    """Put data sets side by side. One of them must have all classes; labels of the others are matched to it by name.

    Mean and std are those of the images of all sets, each image once. Sets with grey and with coloured images are in colour.

    Raises:
        InputError: no set has all classes, or some have several labels a sample and others one.
    """
    classes = _common_classes(sets)
    index = np.concatenate([one.index for one in sets])
    first_id, first_shard, labels = 0, 0, list[np.ndarray]()
    for one in sets:
        own = index[first_id : first_id + one.manifest.samples]
        own["shard"] += first_shard
        new_labels = np.array([classes.index(name) for name in one.manifest.classes], dtype=np.uint32)
        if one.label_sets is None:
            own["label"] = new_labels[own["label"]]
        else:
            own["label"] += sum(map(len, labels))
            labels.append(one.label_sets.renumbered(new_labels).entries)
        first_id, first_shard = first_id + len(own), first_shard + len(one.manifest.shards)
    label_sets = None
    if labels:
        entries = np.concatenate(labels)
        label_sets = LabelSets(np.append(index["label"], len(entries)).astype(np.int64), entries)
    manifest = _manifest(sets, classes, index, label_sets)
    return MixedShards(Path(" + ".join(str(one.path) for one in sets)), manifest, index, label_sets, sets=tuple(sets))


def set_parts(part: Part) -> list[tuple[Part, slice]]:
    """Return the part of each set that a part of a mix has, with ids of the set's own, and the places of its samples."""
    shards, found = part.shards, []
    assert isinstance(shards, MixedShards)
    for one, first, end in zip(shards.sets, shards.first_ids, shards.first_ids[1:], strict=False):
        if part.ids is None:
            found.append((Part(one), slice(first, end)))
        else:
            start, stop = np.searchsorted(part.ids, [first, end]).tolist()
            found.append((Part(one, part.ids[start:stop] - first), slice(start, stop)))
    return found


def _common_classes(sets: Sequence[ShardFolder]) -> list[str]:
    check_same_kind([(str(one.path), one.manifest) for one in sets])
    longest = max(sets, key=lambda one: len(one.manifest.classes))
    classes = longest.manifest.classes
    for one in sets:
        extra = [name for name in one.manifest.classes if name not in classes]
        if extra:
            raise InputError(
                f"data.mix: {one.path} has {listed(extra, most=3)}, which {longest.path} lacks "
                f"({neighbours(extra[0], classes)}); `shards write --classes-of` gives a set the classes of another"
            )
    return list(classes)


def _manifest(
    sets: Sequence[ShardFolder], classes: list[str], index: np.ndarray, label_sets: LabelSets | None
) -> Manifest:
    """Describe the sets as one. Nothing in it depends on the folders' names, so that moved sets are the same."""
    manifests = [one.manifest for one in sets]
    mode = "RGB" if any(one.image_mode == "RGB" for one in manifests) else "L"
    shares = np.array([one.samples for one in manifests]) / sum(one.samples for one in manifests)
    means, stds = (
        np.array([np.broadcast_to(getattr(one, name), CHANNELS[mode]) for one in manifests]) for name in ("mean", "std")
    )  # (sets, channels)
    mean = (shares[:, None] * means).sum(axis=0)
    std = np.sqrt(np.maximum((shares[:, None] * (stds**2 + means**2)).sum(axis=0) - mean**2, 0))
    shapes = {tuple(one.image_shape[1:]) if one.image_shape else None for one in manifests}
    shape = shapes.pop() if len(shapes) == 1 else None
    manifest = Manifest(
        classes=classes,
        samples=len(index),
        samples_per_class=samples_per_class(label_sets or index["label"], len(classes)).tolist(),
        image_mode=mode,
        image_shape=[CHANNELS[mode], *shape] if shape else None,
        encodings=sorted({encoding for one in manifests for encoding in one.encodings}),
        mean=mean.tolist(),
        std=std.tolist(),
        made={"source": "mix", "sets": [one.fingerprint for one in manifests], **_orientation(sets)},
        shards=[
            replace(shard, name=f"{number}/{shard.name}")
            for number, one in enumerate(manifests)
            for shard in one.shards
        ],
        index_sha256=hashlib.sha256(np.ascontiguousarray(index).data).hexdigest(),
        format_version=SEVERAL_LABELS_VERSION if label_sets else FORMAT_VERSION,
        labels_sha256=hashlib.sha256(label_sets.entries.tobytes()).hexdigest() if label_sets else "",
    )
    return replace(manifest, fingerprint=manifest.computed_fingerprint())


def _orientation(sets: Sequence[ShardFolder]) -> dict[str, Any]:
    """Return the part of a manifest that says whether pictures are turned upright.

    Raises:
        InputError: those of some sets are, those of others may not be.
    """
    turned = sum(one.manifest.made.get("turned", 0) for one in sets)
    as_stored = [str(one.path) for one in sets if one.manifest.orientation == "ignore"]
    if turned and as_stored:
        raise InputError(
            f"data.mix: pictures of {listed(as_stored)} are read as they are stored, those of the other sets upright, as "
            f"their cameras noted: write them again with the same --orientation"
        )
    return {} if as_stored else {"orientation": "follow", **({"turned": turned} if turned else {})}


@dataclass(frozen=True)
class _Fork:
    """Some of the sets: of the turns of all of them, `share[0]` of `share[1]` are the first branch's."""

    first: "_Fork | int"
    second: "_Fork | int"
    share: tuple[int, int]


class Turns:
    """Whose turn each position is: a pure function of weights and position, of which any part can be computed alone.

    A tree of forks, where the lightest are joined first (Huffman 1952): of each P turns of a fork, the first branch has
    P x its share, rounded. Each set's count of the first P positions is less than 2 from P x its share, for any P.
    """

    def __init__(self, weights: Sequence[float]):
        """`weights`: above 0, relative to each other."""
        self._sets = len(weights)
        queue: list[tuple[int, int, _Fork | int]] = [
            (parts, number, number) for number, parts in enumerate(_whole(weights))
        ]
        heapq.heapify(queue)
        for number in range(len(weights), 2 * len(weights) - 1):
            (light, _, one), (heavy, _, other) = heapq.heappop(queue), heapq.heappop(queue)
            heapq.heappush(queue, (light + heavy, number, _Fork(other, one, (heavy, light + heavy))))
        self._root = queue[0][2]

    def before(self, positions: np.ndarray) -> np.ndarray:
        """Return how many of the turns before each position are whose. int64, shape (sets, positions)."""
        counts = np.empty((self._sets, len(positions)), dtype=np.int64)
        branches: list[tuple[_Fork | int, np.ndarray]] = [(self._root, positions.astype(np.int64))]
        while branches:
            branch, turns = branches.pop()
            if isinstance(branch, int):
                counts[branch] = turns
                continue
            part, whole = branch.share
            cycles, rest = np.divmod(turns, whole)
            of_first = cycles * part + (rest * part + whole // 2) // whole
            branches += [(branch.first, of_first), (branch.second, turns - of_first)]
        return counts


def _whole(weights: Sequence[float]) -> list[int]:
    """Return weights as whole numbers in the same ratios: exactly, or if these were too large, rounded to 2**-30."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) < _MOST_PARTS:
        return whole
    return [max(1, round(weight * _ROUNDED_PARTS / sum(exact))) for weight in exact]


@dataclass(frozen=True)
class MixedOrders:
    """The inputs of the global order of a mix."""

    seed: int
    sets: tuple[Orders, ...]  # of the sets, with seeds of their own
    samples_per_set: tuple[int, ...]  # in an epoch of the set's own
    first_ids: tuple[int, ...]  # of each set, in the mix
    first_shards: tuple[int, ...]
    weights: tuple[float, ...]
    samples_per_epoch: int  # of the mix

    @cached_property
    def turns(self) -> Turns:
        return Turns(self.weights)

    @cached_property
    def order_of_set(self):  # type: ignore[no-untyped-def] # a function of a set and one of its own epochs
        # A set's epoch goes on when an epoch of the mix ends: the cache is for all of these.
        return lru_cache(maxsize=2 * len(self.sets))(lambda number, epoch: self.sets[number].of_epoch(epoch))

    def of_epoch(self, epoch: int) -> "MixedOrder":
        """Return the order of one epoch of the mix."""
        return MixedOrder(self, epoch)


class MixedOrder:
    """The order of one epoch of a mix. Blocks are those of the sets' own epochs: (set, epoch of the set, lane, block)."""

    def __init__(self, orders: MixedOrders, epoch: int):
        self._orders, self._start = orders, epoch * orders.samples_per_epoch

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at the global positions [start, stop). int64, shape (stop - start,)."""
        before = self._orders.turns.before(self._start + np.arange(start, stop + 1))
        ids = np.empty(stop - start, dtype=np.int64)
        for number, counts in enumerate(before):
            own = [self._of_set(number, epoch).slice(*places) for epoch, places in self._places(number, counts)]
            if own:
                ids[np.diff(counts) == 1] = np.concatenate(own) + self._orders.first_ids[number]
        return ids

    def blocks(self, start: int, stop: int) -> list[tuple[int, ...]]:
        """Return the blocks of the global positions [start, stop)."""
        before = self._orders.turns.before(self._start + np.array([start, stop]))
        return [
            (number, epoch, *block)
            for number, counts in enumerate(before)
            for epoch, places in self._places(number, counts)
            for block in self._of_set(number, epoch).blocks(*places)
        ]

    def shards_of(self, *block: int) -> list[int]:
        """Return the numbers of the shards of a block's samples, in the mix; empty past the last block."""
        number, epoch, *of_set = block
        first = self._orders.first_shards[number]
        return [first + shard for shard in self._of_set(number, epoch).shards_of(*of_set)]

    def _of_set(self, number: int, epoch: int) -> Order:
        return self._orders.order_of_set(number, epoch)

    def _places(self, number: int, counts: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
        """Return the epochs of a set that its turns lie in, and the positions there, [start, stop)."""
        first, last, size = int(counts[0]), int(counts[-1]), self._orders.samples_per_set[number]
        return [
            (epoch, (max(first - epoch * size, 0), min(last - epoch * size, size)))
            for epoch in range(first // size, -(-last // size))
        ]
