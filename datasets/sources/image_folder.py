"""A folder of image files, <class>/<file>, as a Source; and the rules that image_tar.py shares with it."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.datasets.decode import EXTENSIONS
from shardstep.datasets.sources.source import Source

_SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}
_File = TypeVar("_File")


def open_image_folder(path: Path, split: str) -> Source:
    """Find the images in PATH/<split>/<class>/ or PATH/<class>/; see source_of_files for the errors."""
    root = path / split if (path / split).is_dir() else path
    if root is path:
        refuse_other_splits({folder.name for folder in path.iterdir() if folder.is_dir()}, split, path)
    found = sorted(Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names)
    return source_of_files(
        "image folder",
        root,
        {file: file.relative_to(root).parts for file in found},
        {entry.name for entry in root.iterdir() if entry.is_dir()},
        Path.read_bytes,
        lambda file: str(file.relative_to(path)),
        has_splits=root is not path,
    )


def source_of_files(
    description: str,
    where: Path,
    parts_of: Mapping[_File, tuple[str, ...]],
    folders: set[str],
    read: Callable[[_File], bytes],
    name: Callable[[_File], str],
    has_splits: bool,
) -> Source:
    """Make a Source of files in class folders. The classes are the names of the first folders, sorted.

    Args:
        description, has_splits: of the Source.
        where: the folder or tar, for messages.
        parts_of: all files, images or not, and the parts of their paths below the split.
        folders: names of the first folders, with or without images.
        read, name: return the bytes of a file, and its name in messages.

    Raises:
        InputError: there are no images, or some lie outside class folders.
    """
    names = {file: name(file) for file in parts_of}
    images = [file for file in parts_of if is_image(names[file])]
    if not images:
        raise InputError(f"no images in {where}: looked for <class>/<file>.{'|'.join(EXTENSIONS)}")
    loose = [parts_of[file][0] for file in images if len(parts_of[file]) < 2]
    if loose:
        raise InputError(f"{where} holds {count(len(loose), 'image')} outside class folders, such as {loose[0]}")
    classes = sorted({parts_of[file][0] for file in images})
    label_of = {name: label for label, name in enumerate(classes)}
    others = [other for other in names.values() if not is_image(other)]
    return Source(
        description,
        classes,
        np.array([label_of[parts_of[file][0]] for file in images], dtype=np.int64),
        lambda number: read(images[number]),
        lambda number: name(images[number]),
        has_splits,
        ignored=dict(Counter(PurePosixPath(other).suffix or "no suffix" for other in others)),
        empty_folders=sorted(folder for folder in folders - set(classes) if not is_hidden(folder)),
    )


def refuse_other_splits(folders: set[str], split: str, where: Path) -> None:
    """Raise InputError if folders of other splits would be taken for classes, because this split has no folder."""
    others = sorted(folders & _SPLIT_FOLDERS)
    if others:
        raise InputError(f"{where} has no {split}/, only {', '.join(others)}: give the folder itself as the source")


def is_image(name: str) -> bool:
    """Check by its name whether a file is an image in a supported format, and not hidden."""
    return not is_hidden(name) and PurePosixPath(name).suffix.lstrip(".").lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Check whether the last part of a path begins with a dot."""
    return name.rpartition("/")[2].startswith(".")
