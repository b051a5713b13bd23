"""Several labels for each sample, or none: which they are, and with what share.

Beside a manifest they are the file `index-labels`, 8 bytes a label: the class and its share (little-endian uint32, float32).
The label in the index is then the place of a sample's first entry there; its entries end where the next sample's begin.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import printable
from shardstep.datasets.class_names import label_names, label_text

LABELS_NAME = "index-labels"
LABEL_DTYPE = np.dtype([("label", "<u4"), ("share", "<f4")])

NamedShares = tuple[tuple[str, float], ...]
"""The labels of one sample: names, each with its share of 1 at most; 1 for a label that simply holds."""
NamedLabel = str | NamedShares
"""The label of one sample by name, "" for none; or several, and their shares."""


@dataclass(frozen=True)
class LabelSets:
    """The labels of many samples.

    Attributes:
        starts: int64, shape (samples + 1,); sample i has entries[starts[i]:starts[i + 1]], none of a class twice.
        entries: LABEL_DTYPE; a share is above 0 and at most 1, and 1 for a label that simply holds.
    """

    starts: np.ndarray
    entries: np.ndarray

    @classmethod
    def of_names(cls, labels: Sequence[NamedShares], label_of: dict[str, int]) -> "LabelSets":
        """Number the labels of samples."""
        counts = [len(some) for some in labels]
        entries = [(label_of[name], share) for some in labels for name, share in some]
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), np.array(entries, dtype=LABEL_DTYPE))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, numbers: np.ndarray) -> "LabelSets":
        """Return the labels of the samples with these numbers, in this order."""
        starts, places = self._places(numbers)
        return LabelSets(starts, self.entries[places])

    def of(self, number: int) -> list[tuple[int, float]]:
        """Return the labels of one sample and their shares."""
        return self.entries[self.starts[number] : self.starts[number + 1]].tolist()

    def dense(self, numbers: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the share of every class for these samples; float32, shape (len(numbers), num_classes)."""
        starts, places = self._places(numbers)
        shares = np.zeros((len(numbers), num_classes), dtype=np.float32)
        entries = self.entries[places]
        shares[np.repeat(np.arange(len(numbers)), np.diff(starts)), entries["label"]] = entries["share"]
        return shares

    def samples_per_class(self, num_classes: int) -> np.ndarray:
        """Count the samples that have each label, with any share; int64, shape (num_classes,)."""
        return np.bincount(self.entries["label"], minlength=num_classes)

    def rarest(self) -> np.ndarray:
        """Return the label of each sample that the fewest samples have, int64; -1 for a sample without any."""
        rarest = np.full(len(self), -1, dtype=np.int64)
        counts = self.samples_per_class(1)[self.entries["label"]]
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        order = np.lexsort((self.entries["label"], counts, owners))[::-1]  # what is written last stays
        rarest[owners[order]] = self.entries["label"][order]
        return rarest

    def renumbered(self, new_labels: np.ndarray) -> "LabelSets":
        """Return the same labels under other numbers: label i becomes new_labels[i]."""
        entries = self.entries.copy()
        entries["label"] = new_labels[entries["label"]]
        return LabelSets(self.starts, entries)

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the labels of each of some samples begin when they are in one line, and where they are now."""
        begins, counts = self.starts[numbers], self.starts[np.asarray(numbers) + 1] - self.starts[numbers]
        starts = np.concatenate([[0], np.cumsum(counts)])
        return starts, np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)


def strata(labels: np.ndarray | LabelSets) -> np.ndarray:
    """Return what to balance a choice of samples by: the label of each, or of several labels the rarest; int64."""
    return labels.rarest() if isinstance(labels, LabelSets) else labels


def samples_per_class(labels: np.ndarray | LabelSets, num_classes: int) -> np.ndarray:
    """Count the samples that have each class; int64, shape (num_classes,)."""
    if isinstance(labels, LabelSets):
        return labels.samples_per_class(num_classes)
    return np.bincount(labels, minlength=num_classes)


def names_in(label: NamedLabel) -> list[str]:
    """Return the names in a label."""
    return [name for name, _ in label] if not isinstance(label, str) else [label] if label else []


def hold_several(values: Iterable[object]) -> bool:
    """Check whether some of these values, from a table or from JSON, are lists or shares of labels, not one label each."""
    return any(isinstance(value, dict) or (_is_list(value) and len(value) != 1) for value in values)


def several_names(values: Iterable[object], where: str, separator: str | None = None) -> list[NamedShares]:
    """Return the labels in lists of names, in mappings of names to shares, or in text with a separator between names.

    Args:
        values: one for each sample; None and empty text are no labels.
        where: for messages.
        separator: between the names in a text; " " stands for any blanks.

    Raises:
        InputError: a name is a list or a measurement, or a share is not a number from 0 to 1.
    """
    try:
        found = [named_shares(value, separator) for value in values]
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    names = list(dict.fromkeys(name for some in found for name, _ in some))
    class_of = dict(zip(names, label_names(names, where), strict=True))
    return [tuple({class_of[name]: share for name, share in some if class_of[name]}.items()) for some in found]


def named_shares(value: object, separator: str | None = None) -> NamedShares:
    """Return the labels in one value, see several_names, each once, without those whose share is 0.

    Raises:
        ValueError: a name is a list, or a share is not a number from 0 to 1.
    """
    if isinstance(value, dict):
        return tuple((label_text(name), share) for name, each in value.items() if (share := share_of(each, name)))
    if _is_list(value):
        names = [label_text(name) for name in value]
    elif separator is None:
        names = [label_text(value)]
    else:
        names = [name.strip() for name in label_text(value).split(None if separator.isspace() else separator)]
    return tuple((name, 1.0) for name in dict.fromkeys(names) if name)


def share_of(value: object, name: object) -> float:
    """Return the share of a label, 0 for an empty value.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    text = label_text(value)
    try:
        share = {"": 0.0, "true": 1.0, "false": 0.0}.get(text.lower())
        share = float(text) if share is None else share
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{name} has {printable(text[:30])}: the share of a label is a number from 0 to 1")
    return share


def _is_list(value: object) -> TypeGuard[list | tuple | set | np.ndarray]:
    return isinstance(value, list | tuple | set | np.ndarray)
