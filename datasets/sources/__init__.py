"""Where images come from: the name of a source or a path in, a Source out, with one module for each kind.

datasets/write.py, launch/shards.py and trainer/data.py import this package; it imports nothing that writes or reads shards,
except manifest.py.

cifar10         $CIFAR10_SOURCE, else torchvision's download
mnist, svhn...  $TORCHVISION_SOURCE, else torchvision's download, see torchvision_sets.py
digits          the 8x8 digits inside scikit-learn
synthetic:N     N images that a model can learn, generated from a seed
a folder        SRC/<split>/<class>/<file> or SRC/<class>/<file>; <split> is also Train, training_set, seg_train, ...
a .tar of one   the same layout inside
                both also with a table of labels, as metadata.csv|jsonl|parquet or given as LabelOptions
a .parquet or .arrow file, or a folder of them: images and labels in columns, as Hugging Face's datasets writes them
path/to/file.py:function or package.module:function, which takes the split and returns a Source
Tiny ImageNet unpacked, or a folder of ImageNet's archives
an .npz file of arrays, as MedMNIST has them
CIFAR-10's own archives, python or binary, packed (.tar.gz) or unpacked
"""

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.imported import build, find_function, is_imported_source
from shardstep.datasets.class_names import class_name
from shardstep.datasets.input_files import FolderTree
from shardstep.datasets.label_sets import LabelSets
from shardstep.datasets.manifest import Manifest
from shardstep.datasets.sources import cifar10
from shardstep.datasets.sources.arrays import read_arrays
from shardstep.datasets.sources.class_folders import find_class_folders, visible_folders
from shardstep.datasets.sources.digits import DIGIT_CLASSES, DIGITS, read_digits
from shardstep.datasets.sources.image_folder import open_image_folder
from shardstep.datasets.sources.image_tar import open_image_tar
from shardstep.datasets.sources.imagenet import TINY_IMAGENET, open_imagenet_folder
from shardstep.datasets.sources.labelled_files import LABELLED_BY, is_labelled_by
from shardstep.datasets.sources.parquet import COLUMN_FILES
from shardstep.datasets.sources.parquet_images import COLUMN_IMAGES, find_column_files, open_column_images
from shardstep.datasets.sources.source import WRITTEN_ELSEWHERE, Source
from shardstep.datasets.sources.synthetic import make_synthetic
from shardstep.datasets.sources.tables import NO_OPTIONS, LabelOptions
from shardstep.datasets.sources.torchvision_sets import TORCHVISION_SETS, is_another_set, open_torchvision_set
from shardstep.datasets.tar import unpack_command


def open_source(source: str, split: str, labels: LabelOptions = NO_OPTIONS) -> Source:
    """Find the images of one split, "train" or "test".

    Args:
        source: one of the names above, or a path.
        labels: the table of labels and its columns, where the source leaves them open.

    Raises:
        InputError: there is no such source, or it cannot be read, or its labels cannot.
    """
    if source in ("cifar10", "digits", *TORCHVISION_SETS) or source.startswith("synthetic:"):
        _refuse(labels, source)
    if source == "cifar10":
        return _open_cifar10(split)
    if source == "digits":
        return read_digits(split)
    if source.startswith("synthetic:"):
        return make_synthetic(source, split)
    if source in TORCHVISION_SETS:
        return open_torchvision_set(source, split)
    if is_imported_source(source):
        _refuse(labels, source)
        return _open_imported(find_function(source, [Path.cwd()]), split)
    path = Path(source).expanduser()
    if not path.exists():
        known = "cifar10, digits, synthetic:N, a data set of torchvision, nor a folder or archive that exists"
        close = difflib.get_close_matches(source, TORCHVISION_SETS, n=1)
        raise InputError(f"no source {source!r}: neither {known}{f'. Did you mean {close[0]}?' if close else ''}")
    return _open_path(path, split, labels)


def surely_differs(source: str, manifest: Manifest, split: str, labels: LabelOptions = NO_OPTIONS) -> bool:
    """Check by names alone whether shards certainly hold other images or labels than a source, which may no longer exist."""
    made_from, classes = str(manifest.made.get("source")), manifest.classes
    made_here = made_from == DIGITS or made_from.startswith("synthetic:")
    if source == "digits":
        return made_from != DIGITS and (made_here or classes != DIGIT_CLASSES)
    if source.startswith("synthetic:"):
        count = source.removeprefix("synthetic:").lstrip("0")
        return made_from not in (f"synthetic:{count}", WRITTEN_ELSEWHERE)
    if source == "cifar10":
        return made_here or (classes != cifar10.CIFAR10_CLASSES and not os.environ.get("CIFAR10_SOURCE"))
    if source in TORCHVISION_SETS:
        return made_here or is_another_set(made_from, source)
    if is_imported_source(source):
        return made_here
    if labels.table is not None:
        return made_from != WRITTEN_ELSEWHERE and not is_labelled_by(made_from, labels, split)
    return made_here or not _shares_a_class(Path(os.path.expanduser(source)), split, classes, made_from)


def _shares_a_class(source: Path, split: str, classes: list[str], made_from: str) -> bool:
    if made_from.startswith(LABELLED_BY) or made_from in (
        *COLUMN_IMAGES.values(),
        TINY_IMAGENET,
    ):  # the folders are no classes
        return True
    tree = FolderTree(source)
    try:
        folder, has_splits = find_class_folders(tree, split)
        found = {class_name(name) for name in visible_folders(tree, folder)}
        return not has_splits or not found.isdisjoint(classes)
    except InputError:  # an archive, the source no longer exists, or a name is not UTF-8
        return True


def _open_imported(place: str, split: str) -> Source:
    found = build(f"data.source={place}", place, split)
    if problem := _contract_problem(found):
        raise InputError(
            f"{place} {problem}: a source is a function of the split, train or test, that returns a "
            f"shardstep.datasets.sources.source.Source, whose labels are int64 (N,), places in classes, and whose read "
            f"returns the bytes of an image file, or pixels, uint8 (H, W, C)"
        )
    return found


def _contract_problem(found: Any) -> str | None:
    """Return what is wrong with what a source of the user's returned, or with its first image; None if nothing is."""
    if not isinstance(found, Source):
        return f"returned {type(found).__name__}"
    labels = found.labels
    if isinstance(labels, LabelSets):
        return None
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        return f"returned labels that are {_kind(labels)}"
    if labels.min() < 0 or labels.max() >= len(found.classes):
        return f"returned labels from {labels.min()} to {labels.max()} for {len(found.classes)} classes"
    image = found.read(0)
    is_pixels = (
        isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3)
    )
    return None if isinstance(image, bytes) or is_pixels else f"reads an image as {_kind(image)}"


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _open_cifar10(split: str) -> Source:
    given = os.environ.get("CIFAR10_SOURCE")
    if not given:
        return _open_path(cifar10.download_cifar10(), split)
    if not Path(given).exists():
        raise InputError(f"CIFAR10_SOURCE={given} does not exist")
    try:
        return _open_path(Path(given), split)
    except InputError as error:
        raise InputError(f"CIFAR10_SOURCE={given}: {error}") from None


def _refuse(labels: LabelOptions, source: str | Path) -> None:
    """Refuse options of labels for a source that has labels of its own."""
    if labels:
        raise InputError(
            f"{source} has labels of its own: --labels, --image-column, --label-column and --label-separator are for other "
            f"files"
        )


def _open_path(path: Path, split: str, labels: LabelOptions = NO_OPTIONS) -> Source:
    if path.is_dir():
        source = None if labels else cifar10.read_cifar10_folder(path, split)
        if source:
            return source
        # A folder with one tar per split, or with a packed archive, stands for its content.
        for name in (f"{split}.tar", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"):
            if (path / name).is_file():
                return _open_path(path / name, split, labels)
        if not labels and (source := open_imagenet_folder(path, split)):
            return source
        if labels.table is None and (names := find_column_files(path)):
            return open_column_images(path, names, split, labels)
        return open_image_folder(path, split, labels)
    name = path.name.lower() if path.is_file() else ""
    if name.endswith((".tar.gz", ".tgz")) or (name.endswith(".tar") and cifar10.is_cifar10_tar(path)):
        _refuse(labels, path)
        return cifar10.read_cifar10_archive(path, split)
    if name.endswith(".tar"):
        return open_image_tar(path, split, labels)
    if name.endswith(".npz"):
        _refuse(labels, path)
        return read_arrays(path, split)
    if name.endswith(tuple(f".{kind}" for kind in COLUMN_FILES)) and labels.table is None:
        return open_column_images(path.parent, [path.name], None, labels)
    if path.is_file() and (command := unpack_command(path)):
        raise InputError(f"{path} is compressed: unpack it with `{command}`")
    raise InputError(f"{path} is neither a folder nor a .tar; unpack other archives first")
