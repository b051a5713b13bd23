"""A folder of image files, <class>/<file>, as a Source; and the rules that image_tar.py shares with it."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.datasets.decode import EXTENSIONS
from shardstep.datasets.sources.source import Source

_SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


def open_image_folder(path: Path, split: str) -> Source:
    """Find the images in PATH/<split>/<class>/ or PATH/<class>/.

    Raises:
        InputError: there are none, some lie outside a class folder, or the folder holds other splits only.
    """
    root = path / split if (path / split).is_dir() else path
    if root is path:
        refuse_other_splits({folder.name for folder in path.iterdir() if folder.is_dir()}, split, path)
    found = [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]
    files = sorted(file for file in found if is_image(file.name))
    classes, labels = classes_and_labels([file.relative_to(root).parts for file in files], root)
    folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return Source(
        "image folder",
        classes,
        labels,
        lambda number: files[number].read_bytes(),
        lambda number: str(files[number].relative_to(path)),
        has_splits=root is not path,
        ignored=count_ignored(file.name for file in found),
        empty_folders=without_images(folders, classes),
    )


def refuse_other_splits(folders: set[str], split: str, where: Path) -> None:
    """Raise InputError if folders of other splits would be taken for classes, because this split has no folder."""
    others = sorted(folders & _SPLIT_FOLDERS)
    if others:
        raise InputError(f"{where} has no {split}/, only {', '.join(others)}: give the folder itself as the source")


def count_ignored(names: Iterable[str]) -> dict[str, int]:
    """Count the files that are not images in a supported format, by suffix."""
    return dict(Counter(PurePosixPath(name).suffix or "no suffix" for name in names if not is_image(name)))


def without_images(folders: set[str], classes: list[str]) -> list[str]:
    """Return the folders that became no class because they hold no image; hidden ones are left out."""
    return sorted(name for name in folders - set(classes) if not is_hidden(name))


def classes_and_labels(parts: list[tuple[str, ...]], where: Path) -> tuple[list[str], np.ndarray]:
    """Derive the classes (names of the first folders, sorted) and each image's label from the parts of their paths.

    Raises:
        InputError: there are no images, or some lie in no class folder.
    """
    if not parts:
        raise InputError(f"no images in {where}: looked for <class>/<file>.{'|'.join(EXTENSIONS)}")
    loose = [part[0] for part in parts if len(part) < 2]
    if loose:
        raise InputError(f"{where} holds {count(len(loose), 'image')} outside class folders, such as {loose[0]}")
    classes = sorted({part[0] for part in parts})
    label_of = {name: label for label, name in enumerate(classes)}
    return classes, np.array([label_of[part[0]] for part in parts], dtype=np.int64)


def is_image(name: str) -> bool:
    """Check by its name whether a file is an image in a supported format, and not hidden."""
    return not is_hidden(name) and PurePosixPath(name).suffix.lstrip(".").lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Check whether the last part of a path begins with a dot."""
    return name.rpartition("/")[2].startswith(".")
