"""Which files are images: one rule for the folders, tars, shards and predictions that shardstep reads.

A file is an image if its name ends as an image's does (.png, .jpg, ...), and neither it nor a folder above it is hidden or
one of those that operating systems leave beside images. Everything else is left out and counted, and LeftOut makes one line
of the counts. What a file holds is not looked at here: an image that cannot be read is reported by whoever reads it.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.datasets.decode import EXTENSIONS, RARE_EXTENSIONS

IMAGE_EXTENSIONS = (*EXTENSIONS, *RARE_EXTENSIONS)
"""Extensions of the images in folders and tars of people's own: all that decode reads."""

# Of macOS, Windows, Synology, QNAP, NetApp, ext4 and Python; other hidden names begin with a dot.
_SYSTEM_NAMES = (
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir",
    "lost+found", "__pycache__", "recycler", "#recycle", "@recycle", "#snapshot", "~snapshot", "@recently-snapshot",
)  # fmt: skip
# A part of a path (between slashes) that begins with a dot, but is not "." or ".."; or that is one of the names above.
_HIDDEN_PART = re.compile(
    rf"(?:^|/)(?:\.(?!\.?(?:/|$))|(?:{'|'.join(map(re.escape, _SYSTEM_NAMES))})(?:/|$))", re.IGNORECASE
)
_MOST_KINDS = 8  # in a line of LeftOut


def is_hidden(path: str) -> bool:
    """Check whether a file, or a folder above it in this path, is hidden or the system's own."""
    return _HIDDEN_PART.search(path) is not None


def is_image(path: str) -> bool:
    """Check by its name whether a file is an image, and neither hidden nor in a hidden folder."""
    return split_name(path)[1] in IMAGE_EXTENSIONS and not is_hidden(path)


def joined(folder: str, name: str) -> str:
    """Return the path of what is in a folder of a FileTree."""
    return f"{folder}/{name}" if folder else name


def split_name(path: str) -> tuple[str, str]:
    """Split a path at the last dot of its base name into key and extension (in lower case).

    WebDataset splits at the first dot. Keys with dots (`img_1.5x.png`) would then be one key with extensions `5x.png`.
    """
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (folder + slash + stem, extension.lower()) if dot else (path, "")


@dataclass(frozen=True)
class Entry:
    """A file or folder in a folder of a FileTree; links are what they lead to."""

    name: str
    kind: Literal["file", "folder", "broken link", "special file"]
    identity: Hashable  # the same for all links to one file or folder; None for broken links


def files_that_end_in(extensions: Collection[str]) -> str:
    """Say which files are images, for messages."""
    return f"files that end in {', '.join(extensions)}"


_IMAGES = files_that_end_in(IMAGE_EXTENSIONS)


class LeftOut:
    """Counts the files of an input that are not used, by kind, and remembers the first of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a file. `kind` says why it is left out, as a noun that takes an s in the plural: "hidden file"."""
        self.counts[kind] += 1
        self._first.setdefault(kind, name)

    def add_file(self, name: str) -> None:
        """Count a file whose name is not that of an image."""
        extension = split_name(name)[1]
        self.add(f".{extension} file" if extension else "other file", name)

    def add_entry(self, path: str, entry: Entry) -> None:
        """Count a file or folder that is hidden, no image by its name, or no regular file."""
        if is_hidden(entry.name):
            self.add("hidden folder" if entry.kind == "folder" else "hidden file", path)
        elif entry.kind == "file":
            self.add_file(path)
        else:
            self.add(entry.kind, path)

    def update(self, other: "LeftOut") -> None:
        """Add the counts of another one."""
        self.counts += other.counts
        self._first = other._first | self._first

    def line(self, where: Path, used: str = _IMAGES) -> str | None:
        """Format all kinds as one line, the most frequent first; None if none was left out.

        `used` says what is taken instead, in the plural.
        """
        if not self.counts:
            return None
        shown = self.counts.most_common(_MOST_KINDS)
        kinds = [f"{count(n, kind)} ({self._first[kind]}{', ...' if n > 1 else ''})" for kind, n in shown]
        rest = self.counts.total() - sum(n for _, n in shown)
        return f"left out of {where}: {', '.join(kinds)}{f', {rest:,} more' if rest else ''}; used are {used}"


class FileTree(Protocol):
    """A folder, or a tar of one. Paths in it are relative to its root, which is ""."""

    where: Path

    def identity(self, folder: str) -> Hashable:
        """Return the identity of a folder, as in its Entry."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """List a folder, in any order."""

    def read(self, path: str, most: int = -1) -> bytes:
        """Read a file, or `most` bytes of it. Raises ValueError with the reason if it cannot be read."""


class FolderTree:
    """A folder on disk as a FileTree. Links are followed."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def identity(self, folder: str) -> Hashable:
        """Return device and inode."""
        found = os.stat(os.path.join(self.where, folder))
        return found.st_dev, found.st_ino

    def entries(self, folder: str) -> Iterator[Entry]:
        """List a folder. Raises InputError if it cannot be listed."""
        path = os.path.join(self.where, folder)
        try:
            device = os.stat(path).st_dev
            with os.scandir(path) as items:
                yield from (_entry(item, device) for item in items)
        except OSError as error:
            raise InputError(f"the folder {path} cannot be listed ({error.strerror})") from None

    def read(self, path: str, most: int = -1) -> bytes:
        """Read a file; see read_file."""
        return read_file(self.where / path, most)


def _entry(item: "os.DirEntry[str]", device: int) -> Entry:
    if item.is_file(follow_symlinks=False):
        return Entry(item.name, "file", (device, item.inode()))
    try:
        found = item.stat()
    except OSError:  # the target does not exist, is the link itself, or is in a folder that may not be entered
        return Entry(item.name, "broken link", None)
    kinds: dict[int, Literal["file", "folder"]] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    return Entry(item.name, kinds.get(stat.S_IFMT(found.st_mode), "special file"), (found.st_dev, found.st_ino))


def read_file(path: Path, most: int = -1) -> bytes:
    """Read a regular file, or what a link leads to, or the first `most` bytes; never wait for a FIFO or a device.

    Raises:
        ValueError: it cannot be read, with the reason.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("cannot be read (not a regular file)")
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        link = f"link to {os.readlink(path)}: " if path.is_symlink() else ""
        raise ValueError(f"cannot be read ({link}{error.strerror})") from None


@dataclass
class FoundImages:
    """The images in a FileTree, and what is beside them."""

    # Paths, sorted by their parts. A broken link or a FIFO with the name of an image is one of them, so that reading it
    # reports it: an image that is lost, as on a disk that is not mounted, is not just left out.
    images: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    repeated: list[str] = field(default_factory=list)  # images that are another of them under a second name, by links

    def notes(self, where: Path) -> list[str]:
        """Return lines on what was left out, and on images that links lead to more than once."""
        notes = [line] if (line := self.left_out.line(where)) else []
        if self.repeated:
            which = f"{count(len(self.repeated), 'image')} found more than once, by links"
            notes.append(f"{where}: {which}, and used each time: {self.repeated[0]}")
        return notes


def find_images(tree: FileTree, start: str = "", used: Collection[str] = ()) -> FoundImages:
    """Find the images in and below a folder of a tree. Links are followed, except back to a folder above them.

    Args:
        used: paths of other files that are not left out.

    Raises:
        InputError: a folder cannot be listed.
    """
    found, seen = FoundImages(), set[Hashable]()
    waiting = _children(tree, start, frozenset([tree.identity(start)]))
    while waiting:
        path, entry, above = waiting.pop()
        if is_hidden(entry.name):
            found.left_out.add_entry(path, entry)
        elif entry.kind == "folder" and entry.identity in above:
            found.left_out.add("circular link", path)
        elif entry.kind == "folder":
            waiting += _children(tree, path, above | {entry.identity})
        elif is_image(entry.name):
            found.images.append(path)
            if entry.identity in seen:
                found.repeated.append(path)
            elif entry.identity is not None:
                seen.add(entry.identity)
        elif path not in used:
            found.left_out.add_entry(path, entry)
    return found


def _children(tree: FileTree, folder: str, above: frozenset[Hashable]) -> list[tuple[str, Entry, frozenset[Hashable]]]:
    """Return what is in a folder, last name first, with the identities of the folders above it."""
    entries = sorted(tree.entries(folder), key=lambda entry: entry.name, reverse=True)
    return [(joined(folder, entry.name), entry, above) for entry in entries]
