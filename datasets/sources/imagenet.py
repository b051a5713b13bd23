"""ImageNet as its archives hold it, and Tiny ImageNet, as Sources: labels of validation images are in files of their own.

The public test images of both have no labels, so the split test has the validation images.
"""

import io
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.datasets.input_files import FolderTree, read_file
from shardstep.datasets.sources.image_folder import open_image_folder
from shardstep.datasets.sources.image_tar import TarTree, open_image_tar
from shardstep.datasets.sources.labelled_files import label_files
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import NO_OPTIONS, LabelOptions, LabelTable

TINY_IMAGENET, IMAGENET = "Tiny ImageNet", "ImageNet"
_COLUMNS = LabelOptions(image_column="image", label_column="label")


def open_imagenet_folder(path: Path, split: str) -> Source | None:
    """Make a Source of a folder that holds Tiny ImageNet or ImageNet's archives; None if it holds neither.

    Raises:
        InputError: a file is missing or damaged.
    """
    for folder in (path, path / "tiny-imagenet-200"):
        if (folder / "wnids.txt").is_file() and (folder / "val" / "val_annotations.txt").is_file():
            return _open_tiny_imagenet(folder, split)
    train, validation = (path / f"ILSVRC2012_img_{name}.tar" for name in ("train", "val"))
    if split == "train":
        return open_image_tar(train, split, NO_OPTIONS) if train.is_file() else None
    has_devkit = any(path.glob("ILSVRC2012_devkit_t12*"))
    if not validation.is_file() and not (has_devkit and (path / "val").is_dir()):
        return None
    tree = TarTree(validation) if validation.is_file() else FolderTree(path / "val")
    wnids = _validation_wnids(path)
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(wnids) + 1)]
    table = LabelTable(path / "ILSVRC2012_devkit_t12", {"image": names, "label": wnids})
    return replace(label_files(tree, split, "", table, "", _COLUMNS, has_splits=True), description=IMAGENET)


def _open_tiny_imagenet(folder: Path, split: str) -> Source:
    """Make a Source of train/<wnid>/images/, or of val/images/ with val_annotations.txt; words.txt names the classes."""
    wnids = sorted(_lines(folder / "wnids.txt"))
    if split == "train":
        source = open_image_folder(folder / "train", split, NO_OPTIONS)
    else:
        annotations = folder / "val" / "val_annotations.txt"
        rows = [line.split("\t") for line in _lines(annotations)]
        if any(len(row) < 2 for row in rows):
            raise InputError(f"{annotations} has a line without a tab between name and class")
        table = LabelTable(annotations, {"image": [row[0] for row in rows], "label": [row[1] for row in rows]})
        source = label_files(FolderTree(folder / "val"), split, "", table, annotations.name, _COLUMNS, has_splits=True)
    source = source.in_classes(wnids, str(folder / "wnids.txt"))
    return replace(source, description=TINY_IMAGENET, classes=_words(folder / "words.txt", wnids), has_splits=True)


def _words(path: Path, wnids: list[str]) -> list[str]:
    """Return the first word for each class, and its wnid if another one has the same; without the file, the wnids."""
    if not path.is_file():
        return wnids
    words = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in _lines(path))}
    names = [words.get(wnid) or wnid for wnid in wnids]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def _validation_wnids(path: Path) -> list[str]:
    """Return the class of each validation image of ImageNet, in their order, from the development kit, packed or not."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        # ILSVRC2012_ID, WNID, words, gloss, num_children, ...; those without children are the 1000 classes, in any order
        synsets = loadmat(io.BytesIO(_read_devkit(path, "meta.mat")), squeeze_me=True)["synsets"]
        wnid_of = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if synset["num_children"] == 0
        }
        numbers = _read_devkit(path, "ILSVRC2012_validation_ground_truth.txt").split()
        return [wnid_of[int(number)] for number in numbers]
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError, ValueError, TypeError, MatReadError) as error:
        raise InputError(
            f"{path}: no labels of the validation images ({error}): put ILSVRC2012_devkit_t12.tar.gz there, or give the "
            f"labels as a table with --labels (data.labels)"
        ) from None


def _read_devkit(path: Path, name: str) -> bytes:
    packed, name = path / "ILSVRC2012_devkit_t12.tar.gz", f"ILSVRC2012_devkit_t12/data/{name}"
    if not packed.is_file():
        return read_file(path / name)
    with tarfile.open(packed, "r:gz") as archive:
        file = archive.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is not a file")
        return file.read()


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in read_file(path).decode().split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} {error}") from None
