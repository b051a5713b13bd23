"""Images in a numpy .npz file as a Source: MedMNIST's arrays, and those of Keras's mnist.npz."""

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import listed
from shardstep.datasets.class_names import label_names, sorted_classes
from shardstep.datasets.label_sets import names_in
from shardstep.datasets.sources.row_labels import RowLabels, labels_of_shares
from shardstep.datasets.sources.source import Source, numbered_labels

ARRAYS = "arrays of images"  # the description of such a Source
_NAMES = {  # of images and labels, by split
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "val": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def read_arrays(path: Path, split: str) -> Source:
    """Make a Source of images (N, H, W) or (N, H, W, 1 or 3), or (N, 3, H, W), in uint8.

    Labels are (N,) or (N, 1), or a share of each class, (N, K).

    Raises:
        InputError: the file is damaged, or has no such arrays of the split.
    """
    try:
        with path.open("rb") as opened, np.load(_archive(opened), allow_pickle=False) as file:
            pairs = {part: pair for part, names in _NAMES.items() for pair in names if set(pair) <= set(file.files)}
            if split not in pairs:
                looked_for = " or ".join(" and ".join(pair) for pair in _NAMES[split])
                raise InputError(f"{path} has no arrays {looked_for}, only {listed(file.files, most=10)}")
            images = file[pairs[split][0]]
            of_parts = {part: file[pair[1]] for part, pair in pairs.items()}
            # Together, so that the classes and the kind of labels are the same in each.
            found = _labels(np.concatenate(list(of_parts.values())), f"{path}: {pairs[split][1]}")
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as arrays of numpy: {error}") from None
    pixels, count = _pixels(images, f"{path}: {pairs[split][0]}"), len(of_parts[split])
    if len(pixels) != count or not count:
        raise InputError(f"{path}: {len(pixels)} images and {count} labels for {split}")
    classes = found.classes or sorted_classes(name for label in found.of_rows for name in names_in(label))
    before = sum(len(labels) for labels in list(of_parts.values())[: list(of_parts).index(split)])
    return Source(
        ARRAYS,
        classes,
        numbered_labels(found.of_rows[before : before + count], classes),
        lambda number: pixels[number],
        lambda number: f"image {number}",
    )


def _archive(opened: BinaryIO) -> BinaryIO:
    """Return an open file that is a zip archive; NumPy would take any other for a pickle, and advise to load it."""
    if not zipfile.is_zipfile(opened):
        raise ValueError("it is no .npz file, or damaged")
    opened.seek(0)
    return opened


def _labels(labels: np.ndarray, where: str) -> RowLabels:
    """Return labels, (N,) or (N, 1), or shares of K classes, (N, K)."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        classes = [str(number) for number in range(labels.shape[1])]
        return RowLabels(where, labels_of_shares(where, classes, labels.tolist()), classes)
    if labels.size != len(labels):
        raise InputError(f"{where} has the shape {labels.shape}: one label for each image is (N,) or (N, 1)")
    names = label_names(labels.reshape(-1).tolist(), where)
    if "" in names:
        raise InputError(f"{where}: image {names.index('')} has no label")
    return RowLabels(where, names)


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    """Return images of shape (N, H, W, 1 or 3)."""
    if images.dtype != np.uint8:
        raise InputError(f"{where} holds {images.dtype} values: write whole numbers 0 to 255, as uint8")
    if images.ndim == 3:
        return images[:, :, :, np.newaxis]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):  # planes
        return images.transpose(0, 2, 3, 1)
    raise InputError(f"{where} has the shape {images.shape}: images are (N, H, W) or (N, H, W, 3), no volumes")
