"""A tar of an image folder as a Source: images are read in place, nothing is unpacked."""

import os
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Union

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.datasets.input_files import Entry, joined
from shardstep.datasets.sources.image_folder import open_image_tree
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import LabelOptions
from shardstep.datasets.tar import Member, read_members

_Node = Union["_Folder", Member]
IMAGE_TAR = "tar of an image folder"  # the description of one with class folders
_CLASS_TAR = re.compile(r"(?:.*/)?n\d{8}\.tar")  # in ImageNet's tar of tars
_MOST_LINKS = 40  # followed for one path, as on Linux


class _Folder(dict[str, "_Node"]):
    """The members in a folder of a tar, by name."""


class TarTree:
    """A tar as a FileTree: what would be there if it were unpacked into an empty folder.

    Links are followed within the tar. As tar does, names lose a leading "/" and all up to a "..", and of several members of
    one name the last one counts. A tar inside it that holds a class of ImageNet is a folder.

    Raises:
        InputError: see read_members; or a member lies below a file.
    """

    def __init__(self, path: Path) -> None:
        self.where = path
        self._root = _Folder()
        self.replaced: list[str] = []
        for member in read_members(path):
            if _CLASS_TAR.fullmatch(member.name) and member.kind == "file":
                for inner in read_members(path, member):
                    self._add(inner._replace(name=f"{member.name.removesuffix('.tar')}/{inner.name}"))
            else:
                self._add(member)

    def _add(self, member: Member) -> None:
        *folders, name = _parts(member.name) or [""]
        folder = self._root
        for part in folders:
            inner = folder.setdefault(part, _Folder())
            if not isinstance(inner, _Folder):
                raise InputError(f"{self.where}: {member.name} lies below {part}, which is no folder")
            folder = inner
        if not name:
            return
        is_folder, former = member.kind == "folder", folder.get(name)
        if former is not None and is_folder != isinstance(former, _Folder):
            raise InputError(f"{self.where}: {member.name} is both a folder and a file")
        if is_folder:
            folder.setdefault(name, _Folder())
            return
        if former is not None:
            self.replaced.append(member.name)
        folder[name] = member

    def identity(self, folder: str) -> Hashable:
        """Return the identity of the folder's object."""
        return id(self._find(folder))

    def entries(self, folder: str) -> Iterator[Entry]:
        """List a folder."""
        node = self._find(folder)
        assert isinstance(node, _Folder)
        for name in node:
            try:
                found = self._find(joined(folder, name))
            except ValueError:
                yield Entry(name, "broken link", None)
                continue
            if isinstance(found, _Folder):
                yield Entry(name, "folder", id(found))
            else:
                yield Entry(name, "file" if found.kind == "file" else "special file", found.offset)

    def read(self, path: str, most: int = -1) -> bytes:
        """Read a file, or what a link leads to, or the first `most` bytes of it.

        Raises:
            ValueError: it cannot be read, with the reason.
        """
        member = self._find(path)
        if isinstance(member, _Folder) or member.kind != "file":
            raise ValueError("cannot be read (not a regular file)")
        with self.where.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), member.size if most < 0 else min(most, member.size), member.offset)

    def _find(self, path: str) -> _Node:
        """Return what is at a path, links followed. Raises ValueError if that is nothing, or outside the tar."""
        way: list[_Node] = [self._root]
        waiting, target, links = path.split("/")[::-1], path, 0
        while waiting:
            part = waiting.pop()
            if part == "..":
                if len(way) == 1:
                    raise ValueError(f"cannot be read (a link to {target}, outside the tar)")
                way.pop()
                continue
            if part in ("", "."):
                continue
            folder = way[-1]
            node = folder.get(part) if isinstance(folder, _Folder) else None
            if node is None:
                raise ValueError(f"cannot be read (a link to {target}, which is not in the tar)")
            if isinstance(node, _Folder) or node.kind not in ("link", "hard link"):
                way.append(node)
                continue
            target, links = node.target, links + 1
            if links > _MOST_LINKS:
                raise ValueError(f"cannot be read (a link to {target}, in a circle)")
            if node.kind == "hard link":
                way, waiting = [self._root], waiting + _parts(target)[::-1]
            elif target.startswith("/"):
                raise ValueError(f"cannot be read (a link to {target}, outside the tar)")
            else:
                waiting += target.split("/")[::-1]
        return way[-1]


def open_image_tar(path: Path, split: str, options: LabelOptions) -> Source:
    """Find the images in a tar; see TarTree and open_image_tree."""
    tree = TarTree(path)
    source = open_image_tree(IMAGE_TAR, tree, split, options)
    if tree.replaced:
        which = count(len(tree.replaced), "member is", "members are")
        source.notes.append(f"{path}: {which} in the tar again; the last one counts: {tree.replaced[0]}")
    return source


def _parts(name: str) -> list[str]:
    """Return the parts of a member's name below the last "..", as tar unpacks them."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
