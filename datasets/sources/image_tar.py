"""A tar of an image folder as a Source: images are read in place, nothing is unpacked."""

import os
from pathlib import Path, PurePosixPath

from shardstep.datasets.sources.image_folder import is_hidden, is_image, refuse_other_splits, source_of_files
from shardstep.datasets.sources.source import Source
from shardstep.datasets.tar import Member, read_members


def open_image_tar(path: Path, split: str) -> Source:
    """Find the images in <split>/<class>/ or <class>/ of a tar; see read_members and source_of_files for the errors."""
    parts_of = {
        member: tuple(part for part in PurePosixPath(member.name).parts if part != ".")
        for member in sorted(read_members(path), key=lambda member: member.name)
    }
    deep = {parts[0] for member, parts in parts_of.items() if is_image(member.name) and len(parts) > 2}
    has_splits = split in deep
    if has_splits:
        parts_of = {member: parts[1:] for member, parts in parts_of.items() if parts[:1] == (split,)}
    else:
        refuse_other_splits(deep, split, path)
    folders = {parts[0] for member, parts in parts_of.items() if len(parts) > 1 and not is_hidden(member.name)}

    def read(member: Member) -> bytes:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), member.size, member.offset)

    name = "tar of an image folder"
    return source_of_files(name, path, parts_of, folders, read, lambda member: member.name, has_splits)
