"""Source: the labelled images that every kind of source provides, read one at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import listed
from shardstep.datasets.label_sets import LabelSets, NamedLabel

SPLITS = ("train", "test")
START_BYTES = 64  # of an image file: they say what it is
WRITTEN_ELSEWHERE = "tars written elsewhere"  # in a manifest, instead of a Source's description


@dataclass(frozen=True)
class Source:
    """Labelled images, read one at a time."""

    description: str  # what this is, for the manifest, without paths of this machine
    classes: list[str]  # the index is the label
    labels: np.ndarray | LabelSets  # one per image, or several
    read: Callable[[int], bytes | np.ndarray]  # bytes of a file, or pixels: uint8 (height, width, channels)
    name: Callable[[int], str]  # how messages refer to an image, by its number
    has_splits: bool = True  # whether train and test are separate; if not, every split holds all images
    notes: list[str] = field(default_factory=list)  # lines on what was left out and why
    empty_folders: list[str] = field(default_factory=list)  # class folders without images
    start: Callable[[int], bytes] | None = None  # the first START_BYTES of a file, where that is quicker than `read`

    def only(self, numbers: np.ndarray) -> "Source":
        """Return a source of the images with these numbers, in this order."""
        return replace(
            self,
            labels=self.labels[numbers],
            read=lambda number: self.read(int(numbers[number])),
            name=lambda number: self.name(int(numbers[number])),
            start=None if self.start is None else lambda number: self.start(int(numbers[number])),  # type: ignore[misc]
        )

    def in_classes(self, classes: list[str], owner: str) -> "Source":
        """Return the same images, labelled by the class list of another data set, `owner`, which may have more classes.

        Raises:
            InputError: the list lacks a class of these images.
        """
        label_of = {name: label for label, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in label_of]
        if unknown:
            raise InputError(
                f"{owner} has no class {listed(unknown)}, only {listed(classes)}: remove the images of other classes "
                f"from this source, or write {owner} again with some of them"
            )
        new_labels = np.array([label_of[name] for name in self.classes], dtype=np.int64)
        labels = self.labels.renumbered(new_labels) if isinstance(self.labels, LabelSets) else new_labels[self.labels]
        return replace(self, classes=list(classes), labels=labels, empty_folders=[])


def is_fifth_of_class(labels: np.ndarray) -> np.ndarray:
    """Choose test samples where a data set has no split: the fifth, tenth, ... of each class; a boolean for each label."""
    order = np.argsort(labels, kind="stable")
    of_class = labels[order]
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels)) - np.searchsorted(of_class, of_class)
    return place % 5 == 4


def numbered_labels(labels: Sequence[NamedLabel], classes: Sequence[str]) -> np.ndarray | LabelSets:
    """Return the labels of a Source from the names of one label for each image, or of several."""
    label_of = {name: label for label, name in enumerate(classes)}
    names = [label for label in labels if isinstance(label, str)]
    if len(names) == len(labels):
        return np.array([label_of[name] for name in names], dtype=np.int64)
    return LabelSets.of_names([label for label in labels if not isinstance(label, str)], label_of)
