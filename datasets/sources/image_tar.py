"""A tar of an image folder as a Source: images are read in place, nothing is unpacked."""

import os
from pathlib import Path, PurePosixPath

from shardstep.datasets.sources.image_folder import (
    classes_and_labels,
    count_ignored,
    is_hidden,
    is_image,
    refuse_other_splits,
    without_images,
)
from shardstep.datasets.sources.source import Source
from shardstep.datasets.tar import read_members


def open_image_tar(path: Path, split: str) -> Source:
    """Find the images in <split>/<class>/ or <class>/ of a tar.

    Raises:
        InputError: the tar is damaged or holds no images, some lie outside a class folder, or it holds other splits only.
    """
    parts_of = {member: _parts(member.name) for member in sorted(read_members(path), key=lambda member: member.name)}
    deep = {parts[0] for member, parts in parts_of.items() if is_image(member.name) and len(parts) > 2}
    has_splits = split in deep
    if has_splits:
        parts_of = {member: parts[1:] for member, parts in parts_of.items() if parts[:1] == (split,)}
    else:
        refuse_other_splits(deep, split, path)
    members = [member for member in parts_of if is_image(member.name)]
    classes, labels = classes_and_labels([parts_of[member] for member in members], path)
    folders = {parts[0] for member, parts in parts_of.items() if len(parts) > 1 and not is_hidden(member.name)}

    def read(number: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), members[number].size, members[number].offset)

    return Source(
        "tar of an image folder",
        classes,
        labels,
        read,
        lambda number: members[number].name,
        has_splits,
        ignored=count_ignored(member.name for member in parts_of),
        empty_folders=without_images(folders, classes),
    )


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != ".")
