"""Parts of a data set: the samples to train on, and those that are held out for validation.

Which samples are held out is a pure function of the labels, the share or the fold, and a seed: the same on every machine.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.held_out import Fold
from shardstep.configs.text import count
from shardstep.datasets.label_sets import LabelSets, samples_per_class
from shardstep.datasets.manifest import Manifest, ShardFolder
from shardstep.datasets.rng import philox_words

_STREAM = 3  # of random numbers: beside those in order.py
PartName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Part:
    """All samples of an open data set, or those with certain ids."""

    shards: ShardFolder
    ids: np.ndarray | None = None  # int64, ascending

    @property
    def manifest(self) -> Manifest:
        """The manifest of the whole data set."""
        return self.shards.manifest

    @property
    def samples(self) -> int:
        return self.manifest.samples if self.ids is None else len(self.ids)

    @property
    def samples_per_shard(self) -> list[int]:
        """How many samples of this part each shard has, in manifest order."""
        whole = self.shards.samples_per_shard
        if self.ids is None:
            return whole
        starts = np.cumsum([0, *whole])
        return np.diff(np.searchsorted(self.ids, starts)).tolist()

    @property
    def labels(self) -> np.ndarray | LabelSets:
        """One label each, int64, shape (samples,), or the labels of each."""
        return self.shards.labels if self.ids is None else self.shards.labels[self.ids]

    def samples_per_class(self) -> np.ndarray:
        """Count the samples of this part that have each class; int64, shape (classes,)."""
        return samples_per_class(self.labels, len(self.manifest.classes))

    def ids_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the ids of samples that are numbered from 0 in this part, int64."""
        return numbers if self.ids is None else self.ids[numbers]

    def first(self, count: int) -> np.ndarray:
        """Return the ids of the first samples, at most `count`."""
        return self.ids_of(np.arange(min(count, self.samples)))

    def all_ids(self) -> np.ndarray:
        """Return the ids of all samples."""
        return self.first(self.samples)


def hold_out(shards: ShardFolder, share: float | Fold, seed: int) -> tuple[Part, Part]:
    """Split a data set by class into the part to train on and the part to validate on; a mix, each of its sets by class.

    The samples are sorted by class and shuffled within each class; then samples at equal distances are held out. So each
    class has its share, but for less than one sample. The folds of one number of folds share no sample, and together are
    the whole set.

    Raises:
        InputError: one of the parts would be empty.
    """
    total = shards.manifest.samples
    by_class = np.lexsort((philox_words(total, (seed, 0), (0, 0, _STREAM)), shards.strata))
    places = np.arange(total)
    if isinstance(share, Fold):
        is_held_out = places % share.folds == share.number - 1
    else:
        held_out = round(share * total)
        is_held_out = (places + 1) * held_out // total > places * held_out // total
    parts = [np.sort(by_class[chosen]) for chosen in (~is_held_out, is_held_out)]
    for ids, purpose in zip(parts, ("train", "validate"), strict=True):
        if len(ids) == 0:
            raise InputError(
                f"{shards.path} has {count(total, 'sample')}: {_setting(share)} leaves none to {purpose} on"
            )
    train, validation = (Part(shards, ids) for ids in parts)
    return train, validation


def _setting(share: float | Fold) -> str:
    return f"data.fold={share}" if isinstance(share, Fold) else f"data.validation={share:g}"
