"""A tree of image files as a Source, <class>/<file> or with a table: a folder, or what image_tar.py reads from a tar."""

from collections import Counter
from pathlib import Path

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, listed
from shardstep.datasets.class_names import class_name, sorted_classes
from shardstep.datasets.input_files import (
    IMAGE_EXTENSIONS,
    FileTree,
    FolderTree,
    FoundImages,
    find_images,
    is_hidden,
    is_image,
    joined,
)
from shardstep.datasets.sources.class_folders import (
    find_class_folders,
    folders_like_splits,
    refuse_what_are_no_classes,
    split_folders,
)
from shardstep.datasets.sources.labelled_files import open_labelled_tree, open_metadata_tree
from shardstep.datasets.sources.source import START_BYTES, Source
from shardstep.datasets.sources.tables import LabelOptions

IMAGE_FOLDER = "image folder"  # the description of class folders


def open_image_folder(path: Path, split: str, options: LabelOptions) -> Source:
    """Find the images in a folder; see open_image_tree."""
    return open_image_tree(IMAGE_FOLDER, FolderTree(path), split, options)


def open_image_tree(description: str, tree: FileTree, split: str, options: LabelOptions) -> Source:
    """Make a Source of files with the labels of a table, that of the options or metadata.csv; else of files in class folders.

    The classes of folders are the names of the first folders, see sorted_classes.

    Args:
        description: of a Source of class folders.
        tree: holds the files in any folders; or class folders, or a folder for each split, or a single folder of these.
        split: "train" or "test".

    Raises:
        InputError: see open_labelled_tree; or there are no images, some lie outside class folders, or the folders are no
            classes.
    """
    if options.table is not None:
        return open_labelled_tree(tree, split, options)
    if source := open_metadata_tree(tree, split, options):
        return source
    if options:
        raise InputError(
            f"{tree.where} has no table whose columns could be chosen: give one with --labels (data.labels)"
        )
    return _open_class_folders(description, tree, split)


def _open_class_folders(description: str, tree: FileTree, split: str) -> Source:
    start, has_splits = find_class_folders(tree, split)
    found = find_images(tree, start)
    images, where = found.images, tree.where / start
    if not images:
        line = found.left_out.line(tree.where)
        remedy = f"looked for <class>/<file>.{'|'.join(IMAGE_EXTENSIONS)}"
        raise InputError(f"no images in {where}: {remedy}{f'; {line}' if line else ''}")
    skip = len(start.split("/")) if start else 0
    parts = [image.split("/")[skip:] for image in images]
    loose = [image[0] for image in parts if len(image) < 2]
    if loose:
        which = f"{count(len(loose), 'image')} outside class folders, such as {loose[0]}"
        raise InputError(f"{where} holds {which}: sort them into <class>/<file>, or give another source")
    refuse_what_are_no_classes(parts, has_splits, str(where))
    name_of = {folder: class_name(folder) for folder in sorted({image[0] for image in parts})}
    classes = sorted_classes(name_of.values())
    label_of = {name: label for label, name in enumerate(classes)}
    return Source(
        description,
        classes,
        np.array([label_of[name_of[image[0]]] for image in parts], dtype=np.int64),
        lambda number: tree.read(images[number]),
        lambda number: images[number],
        has_splits,
        notes=_notes(tree, start, found, has_splits, name_of, folders_like_splits(parts)),
        empty_folders=_empty_folders(tree, start, set(name_of)),
        start=lambda number: tree.read(images[number], START_BYTES),
    )


def _empty_folders(tree: FileTree, start: str, classes: set[str]) -> list[str]:
    """Return first folders without images. A broken link in their place is one: it may lead to an unmounted disk."""
    entries = [entry for entry in tree.entries(start) if entry.name not in classes and not is_hidden(entry.name)]
    names = {"folder": "{}", "broken link": "{} (a broken link)"}
    return sorted(names[entry.kind].format(entry.name) for entry in entries if entry.kind in names)


def _notes(
    tree: FileTree, start: str, found: FoundImages, has_splits: bool, name_of: dict[str, str], like_splits: list[str]
) -> list[str]:
    """Return what to tell about images that are left out or found more than once, and folders passed through or merged.

    Args:
        name_of: the classes of the folders.
        like_splits: class folders that may well be splits.
    """
    notes = []
    if start:
        notes += [
            f"{tree.where / folder} is not used: a validation set is written from this folder as a source of its own, and "
            f"given as data.validation"
            for folder in _count_beside(tree, start, found)
        ]
    if start and not has_splits:
        notes.append(f"{tree.where}: the classes are the folders in {start}/, the only folder")
    notes += found.notes(tree.where)
    merged = [name for name, folders in Counter(name_of.values()).items() if folders > 1]
    if merged:
        notes.append(f"merged: folders whose names are one in another Unicode form (NFC and NFD): {listed(merged)}")
    if like_splits:
        notes.append(
            f"{tree.where / start}: the classes {listed(like_splits)} hold folders of the same names. If they are splits or "
            f"folds, give each as a source of its own, or call them train/ and test/"
        )
    return notes


def _count_beside(tree: FileTree, start: str, found: FoundImages) -> list[str]:
    """Count what lies beside the folders that lead to the class folders, other splits excepted.

    Returns:
        The folders of a validation set beside that of the training set.
    """
    above, validation = "", []
    for passed in start.split("/"):
        entries = sorted(tree.entries(above), key=lambda entry: entry.name)
        splits = split_folders([entry.name for entry in entries if entry.kind == "folder"])
        for entry in entries:
            path = joined(above, entry.name)
            is_other_split = entry.name in splits and splits[entry.name] != splits.get(passed)
            if is_other_split and (splits.get(passed), splits[entry.name]) == ("train", "val"):
                validation.append(path)
            if entry.name == passed or is_other_split:
                continue
            if entry.kind == "file" and is_image(entry.name):
                found.left_out.add("loose image", path)
            else:
                found.left_out.add_entry(path, entry)
        above = joined(above, passed)
    return validation
