"""Where images come from: a name or path in, a Source out: classes, labels, and images by number.

cifar10         $CIFAR10_SOURCE, else torchvision's download
digits          the 8x8 digits inside scikit-learn
synthetic:N     N images that can be learnt, from a seed
a folder        SRC/<split>/<class>/<file> or SRC/<class>/<file>
a .tar of one   the same layout inside
CIFAR-10's own archives, python or binary, packed (.tar.gz) or unpacked
"""

import gzip
import io
import os
import pickle
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.datasets.cache import cache_folder, node_lock
from shardstep.datasets.decode import EXTENSIONS
from shardstep.datasets.manifest import Manifest
from shardstep.datasets.rng import philox_words
from shardstep.datasets.tar import read_members

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SPLITS = ("train", "test")
_SPLIT_FOLDERS = ("train", "test", "val", "valid", "validation")
_MOST_SYNTHETIC = 10_000_000
WRITTEN_ELSEWHERE = "tars written elsewhere"  # in manifests, where a Source's description stands else
_DIGITS, _DIGIT_CLASSES = "digits of scikit-learn", [str(label) for label in range(10)]


@dataclass(frozen=True)
class Source:
    """Labelled images, read one at a time.

    Attributes:
        description: for the manifest: what this is, without paths of the machine.
        classes: names; the index is the label.
        labels: one label per image.
        read: number of an image -> the bytes of its file, or its pixels as uint8 (height, width, channels).
        name: number of an image -> what to call it in messages.
        has_splits: whether train and test are told apart; if not, every split holds all images.
        ignored: files that are no images of a kind we keep: how many of each suffix.
        empty_folders: names of class folders without an image of a kind we keep.
    """

    description: str
    classes: list[str]
    labels: np.ndarray
    read: Callable[[int], bytes | np.ndarray]
    name: Callable[[int], str]
    has_splits: bool = True
    ignored: dict[str, int] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)

    def extension(self, number: int) -> str:
        """The file name extension of an image; pixels become PNG."""
        suffix = PurePosixPath(self.name(number)).suffix.lstrip(".").lower()
        return suffix if suffix in EXTENSIONS else "png"

    def only(self, numbers: np.ndarray) -> "Source":
        """The images of some numbers, in that order."""
        return replace(
            self,
            labels=self.labels[numbers],
            read=lambda number: self.read(int(numbers[number])),
            name=lambda number: self.name(int(numbers[number])),
        )

    def in_classes(self, classes: list[str], owner: str) -> "Source":
        """The same images, with labels in the list of another data set, `owner`, which may have more classes.

        Raises:
            InputError: it lacks a class of these images.
        """
        label_of = {name: label for label, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in label_of]
        if unknown:
            raise InputError(
                f"{owner} has no class {listed(unknown)}, only {listed(classes)}: leave images of others out of this "
                f"source, or write {owner} anew with some of them"
            )
        new_labels = np.array([label_of[name] for name in self.classes], dtype=np.int64)
        return replace(self, classes=list(classes), labels=new_labels[self.labels], empty_folders=[])


def open_source(source: str, split: str) -> Source:
    """Find the images of one split.

    Args:
        source: one of the names above, or a path.
        split: "train" or "test".

    Raises:
        InputError: there is nothing of the kind, or it cannot be read.
    """
    if source == "cifar10":
        return _cifar10(split)
    if source == "digits":
        return _digits(split)
    if source.startswith("synthetic:"):
        return _synthetic(source, split)
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(
            f"no source {source!r}: neither cifar10, digits, synthetic:N, nor a folder or archive that exists"
        )
    return _from_path(path, split)


def surely_differs(source: str, manifest: Manifest, split: str) -> bool:
    """Whether shards hold other images than a source, as far as a look at names tells; the source may be gone."""
    made_from, classes = str(manifest.made.get("source")), manifest.classes
    made_here = made_from == _DIGITS or made_from.startswith("synthetic:")
    if source == "digits":
        return made_from != _DIGITS and (made_here or classes != _DIGIT_CLASSES)
    if source.startswith("synthetic:"):
        count = source.removeprefix("synthetic:").lstrip("0")
        return made_from not in (f"synthetic:{count}", WRITTEN_ELSEWHERE)
    if source == "cifar10":
        return made_here or (classes != CIFAR10_CLASSES and not os.environ.get("CIFAR10_SOURCE"))
    return made_here or not _shares_a_class(os.path.join(os.path.expanduser(source), split), classes)


def _shares_a_class(folder: str, classes: list[str]) -> bool:
    try:
        with os.scandir(folder) as entries:
            return not {entry.name for entry in entries if entry.is_dir()}.isdisjoint(classes)
    except OSError:  # an archive, or gone
        return True


def listed(names: list[str], most: int = 5) -> str:
    """Names for a message: all, or the first few and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _from_path(path: Path, split: str) -> Source:
    if path.is_dir():
        batches = _cifar_members(path.rglob("*"), split)
        if batches:
            return _cifar_arrays({file.name: file.read_bytes() for file in batches})
        # A folder of one tar a split, or of packed archives, stands for what is in them.
        for name in (f"{split}.tar", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"):
            if (path / name).is_file():
                return _from_path(path / name, split)
        return _image_folder(path, split)
    if path.name.endswith((".tar.gz", ".tgz")) or (path.suffix == ".tar" and _holds_cifar_batches(path)):
        return _cifar_archive(path, split)
    if path.suffix == ".tar":
        return _image_tar(path, split)
    raise InputError(f"{path} is neither a folder nor a .tar or .tar.gz archive")


# --- folders and tars of image files ----------------------------------------------------------------------------------


def _image_folder(path: Path, split: str) -> Source:
    root = path / split if (path / split).is_dir() else path
    if root is path:
        _refuse_other_splits({folder.name for folder in path.iterdir() if folder.is_dir()}, split, path)
    found = [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]
    files = sorted(file for file in found if _is_image(file.name))
    classes, labels = _classes_of([file.relative_to(root).parts for file in files], root)
    folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return Source(
        "image folder",
        classes,
        labels,
        lambda number: files[number].read_bytes(),
        lambda number: str(files[number].relative_to(path)),
        has_splits=root is not path,
        ignored=_count_ignored(file.name for file in found),
        empty_folders=_without_images(folders, classes),
    )


def _image_tar(path: Path, split: str) -> Source:
    parts_of = {member: _parts(member.name) for member in sorted(read_members(path), key=lambda member: member.name)}
    deep = {parts[0] for member, parts in parts_of.items() if _is_image(member.name) and len(parts) > 2}
    has_splits = split in deep
    if has_splits:
        parts_of = {member: parts[1:] for member, parts in parts_of.items() if parts[:1] == (split,)}
    else:
        _refuse_other_splits(deep, split, path)
    members = [member for member in parts_of if _is_image(member.name)]
    classes, labels = _classes_of([parts_of[member] for member in members], path)
    folders = {parts[0] for member, parts in parts_of.items() if len(parts) > 1 and not _is_hidden(member.name)}

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
        ignored=_count_ignored(member.name for member in parts_of),
        empty_folders=_without_images(folders, classes),
    )


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != ".")


def _refuse_other_splits(folders: set[str], split: str, where: Path) -> None:
    """Without its own folder, a split must not take the others' for classes."""
    others = sorted(folders & set(_SPLIT_FOLDERS))
    if others:
        raise InputError(f"{where} has no {split}/, only {', '.join(others)}: name the folder itself as the source")


def _count_ignored(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(PurePosixPath(name).suffix or "no suffix" for name in names if not _is_image(name)))


def _without_images(folders: set[str], classes: list[str]) -> list[str]:
    return sorted(name for name in folders - set(classes) if not _is_hidden(name))


def _classes_of(parts: list[tuple[str, ...]], where: Path) -> tuple[list[str], np.ndarray]:
    """Classes are the first folders' names, sorted; images that lie in none are an error."""
    if not parts:
        raise InputError(f"no images in {where}: looked for <class>/<file>.{'|'.join(EXTENSIONS)}")
    loose = [part[0] for part in parts if len(part) < 2]
    if loose:
        raise InputError(f"{len(loose)} images in {where} lie in no class folder, such as {loose[0]}")
    classes = sorted({part[0] for part in parts})
    number = {name: label for label, name in enumerate(classes)}
    return classes, np.array([number[part[0]] for part in parts], dtype=np.int64)


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and PurePosixPath(name).suffix.lstrip(".").lower() in EXTENSIONS


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def _cifar10(split: str) -> Source:
    given = os.environ.get("CIFAR10_SOURCE")
    if given:
        if not Path(given).exists():
            raise InputError(f"CIFAR10_SOURCE={given} does not exist")
        try:
            return _from_path(Path(given), split)
        except InputError as error:
            raise InputError(f"CIFAR10_SOURCE={given}: {error}") from None
    return _from_path(download_cifar10(), split)


def download_cifar10(tries: int = 3) -> Path:
    """Fetch CIFAR-10's archive from where torchvision fetches it, once, into the cache folder.

    Raises:
        InputError: it cannot be had after `tries` attempts; the message names the other ways.
    """
    from torchvision.datasets import CIFAR10

    folder = cache_folder() / "downloads"
    archive = folder / CIFAR10.filename
    with node_lock(folder / ".lock"):
        return _download_locked(archive, tries)


def _download_locked(archive: Path, tries: int) -> Path:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(str(archive), CIFAR10.tgz_md5):
        return archive
    problem: Exception | None = None
    for _ in range(tries):
        try:
            download_url(CIFAR10.url, str(archive.parent), CIFAR10.filename, CIFAR10.tgz_md5)
            return archive
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
            problem = error
            archive.unlink(missing_ok=True)
            if isinstance(error, HTTPError):
                error.close()
    raise InputError(
        f"CIFAR-10 could not be downloaded from {CIFAR10.url} in {tries} tries ({problem}). Without a network, point "
        f"CIFAR10_SOURCE at a folder with train.tar and test.tar or at one of CIFAR-10's own archives, put the archive "
        f"at {archive}, or use another source: digits, synthetic:N, a folder of images"
    )


def _cifar_members(files: Any, split: str) -> list[Any]:
    """Of files or tar members: the batches of one split, in order."""
    names = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    found = {Path(file.name).name.removesuffix(".bin"): file for file in files}
    return [found[name] for name in names] if all(name in found for name in names) else []


def _holds_cifar_batches(path: Path) -> bool:
    return any(PurePosixPath(member.name).name.startswith("test_batch") for member in read_members(path))


def _cifar_archive(path: Path, split: str) -> Source:
    try:
        # Read in memory, so that nothing is unpacked to disk, and to its end, where gzip's checksum is.
        content = gzip.decompress(path.read_bytes()) if path.name.endswith("gz") else path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            batches = _cifar_members(archive.getmembers(), split)
            contents = {Path(member.name).name: _member_bytes(archive, member) for member in batches}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an archive: {error}") from None
    if not contents:
        raise InputError(f"{path} does not hold CIFAR-10's {split} batches")
    return _cifar_arrays(contents)


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise InputError(f"{member.name} in the archive is not a file")
    return file.read()


def _cifar_arrays(batches: dict[str, bytes]) -> Source:
    pixels, labels = [], []
    for name, content in batches.items():
        batch_pixels, batch_labels = (
            _read_binary(name, content) if name.endswith(".bin") else _read_python(name, content)
        )
        pixels.append(batch_pixels)
        labels.append(batch_labels)
    # planes of 32x32, as both kinds of archive store them: (N, 3072) -> (N, 32, 32, 3)
    images = np.ascontiguousarray(np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Source(
        "CIFAR-10",
        list(CIFAR10_CLASSES),
        np.concatenate(labels),
        lambda number: images[number],
        lambda number: f"image {number}",
    )


def _read_binary(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(content, dtype=np.uint8)
    if len(records) == 0 or len(records) % 3073:
        raise InputError(f"{name} is not a batch of CIFAR-10: {len(records)} bytes are not a multiple of 3073")
    records = records.reshape(-1, 3073)  # a byte of label, then 3072 of pixels
    return records[:, 1:], _cifar_labels(name, records[:, 0].astype(np.int64))


def _read_python(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _InertUnpickler(io.BytesIO(content), encoding="latin1").load()
        data = np.frombuffer(batch["data"].buffer(), dtype=np.uint8).reshape(-1, 3072)
        labels = np.array(batch["labels"], dtype=np.int64)
    except (pickle.UnpicklingError, KeyError, AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{name} is not a batch of CIFAR-10's python archive: {error}") from None
    if len(labels) != len(data):
        raise InputError(f"{name} is not a batch of CIFAR-10: {len(data)} images and {len(labels)} labels")
    return data, _cifar_labels(name, labels)


def _cifar_labels(name: str, labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() > 9:
        raise InputError(f"{name}: label {labels.max()} is out of CIFAR-10's range 0..9")
    return labels


class _InertArray:
    """Stands in for numpy.ndarray in a pickle: keeps the state that it is given and does nothing with it."""

    def __init__(self, *_: Any):
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def buffer(self) -> bytes:
        content = self._state[-1]  # (version, shape, dtype, is_fortran, bytes)
        return content.encode("latin1") if isinstance(content, str) else content


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, which Python 3's pickles of bytes name."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


class _InertUnpickler(pickle.Unpickler):
    """Reads the containers, numbers and strings of a pickle; nothing that it names is imported or called."""

    _STAND_INS = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _InertArray,
        ("numpy._core.multiarray", "_reconstruct"): _InertArray,
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertArray,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._STAND_INS[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs") from None


# --- sets that need no download ---------------------------------------------------------------------------------------


def _digits(split: str) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the source digits needs scikit-learn: pip install shardstep[digits]") from None
    digits = load_digits()
    # Every fifth sample of each class is for testing: the same split everywhere, with all classes in both parts.
    rank_in_class = np.empty(len(digits.target), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        rank_in_class[members] = np.arange(len(members))
    chosen = np.flatnonzero((rank_in_class % 5 == 4) == (split == "test"))
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 17 grey levels, (N, 8, 8)
    return Source(
        _DIGITS,
        list(_DIGIT_CLASSES),
        digits.target[chosen].astype(np.int64),
        lambda number: images[number, :, :, np.newaxis],
        lambda number: f"image {number}",
    )


def _synthetic(source: str, split: str) -> Source:
    count_text = source.removeprefix("synthetic:")
    if not count_text.isdecimal() or int(count_text) == 0:
        raise InputError(f"{source!r}: write synthetic:N with a number of images, such as synthetic:1000")
    count, size, num_classes = int(count_text), 32, 10
    if count > _MOST_SYNTHETIC:
        raise InputError(f"{source!r}: at most {_MOST_SYNTHETIC:,} images can be made")
    key = (20260101, SPLITS.index(split) if split in SPLITS else len(SPLITS))
    labels = (philox_words(count, key, (1, 0, 0)) % np.uint64(num_classes)).astype(np.int64)

    # Each class is a smooth coloured pattern: a 4x4 grid of random colours, enlarged. Images are noisy copies.
    grid = (philox_words(num_classes * 48, (20260101, 0), (0, 0, 0)) >> np.uint64(56)).astype(np.float64)
    patterns = grid.reshape(num_classes, 4, 4, 3).repeat(size // 4, axis=1).repeat(size // 4, axis=2)

    def read(number: int) -> np.ndarray:
        words = philox_words(size * size * 3 // 8, key, (2, number, 0))
        noise = words.view(np.uint8).reshape(size, size, 3)  # 0..255
        return (patterns[labels[number]] * 0.5 + noise * 0.5).astype(np.uint8)

    return Source(
        source, [f"class{label}" for label in range(num_classes)], labels, read, lambda number: f"image {number}"
    )
