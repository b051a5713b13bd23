"""CIFAR-10 as a Source: the download, and its archives in the python and the binary format, packed or unpacked.

The python archive is a pickle; it is read without importing or calling anything that it names.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import file_lock
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.sources.source import Source
from shardstep.datasets.tar import read_members, unpack_command

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def download_cifar10(tries: int = 3) -> Path:
    """Download CIFAR-10's archive from where torchvision gets it, once, into the cache folder.

    Raises:
        InputError: all `tries` attempts failed; the message lists the alternatives.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    archive = cache_folder() / "downloads" / CIFAR10.filename
    problem: Exception | None = None
    with file_lock(archive.parent / ".lock"):
        if check_integrity(str(archive), CIFAR10.tgz_md5):
            return archive
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


def read_cifar10_folder(path: Path, split: str) -> Source | None:
    """Read the unpacked batches of one split in a folder or below it; None if they are not there."""
    batches = _batches(path.rglob("*"), split)
    return _from_batches({file.name: file.read_bytes() for file in batches}) if batches else None


def is_cifar10_tar(path: Path) -> bool:
    """Check whether a tar is one of CIFAR-10's archives."""
    return any(PurePosixPath(member.name).name in ("test_batch", "test_batch.bin") for member in read_members(path))


def read_cifar10_archive(path: Path, split: str) -> Source:
    """Read one split of CIFAR-10's python or binary archive.

    Raises:
        InputError: the file is damaged, or is no such archive.
    """
    try:
        # In memory, so that nothing is unpacked to disk, and to the end, where gzip has its checksum.
        content = gzip.decompress(path.read_bytes()) if path.name.endswith("gz") else path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            batches = _batches(archive.getmembers(), split)
            contents = {Path(member.name).name: _member_bytes(archive, member) for member in batches}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an archive: {error}") from None
    if not contents:
        remedy = f". Unpack other archives first: `{command}`" if (command := unpack_command(path)) else ""
        raise InputError(f"{path} does not hold CIFAR-10's {split} batches{remedy}")
    return _from_batches(contents)


def _batches(files: Iterable[Any], split: str) -> list[Any]:
    """Select the batches of one split, in order, from files or tar members; empty unless all are there."""
    names = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    found = {Path(file.name).name.removesuffix(".bin"): file for file in files}
    return [found[name] for name in names] if all(name in found for name in names) else []


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise InputError(f"{member.name} in the archive is not a file")
    return file.read()


def _from_batches(batches: dict[str, bytes]) -> Source:
    read = [(_read_binary if name.endswith(".bin") else _read_python)(name, batches[name]) for name in batches]
    # Both kinds of archive store planes of 32x32: (N, 3072) -> (N, 32, 32, 3)
    planes = np.concatenate([pixels for pixels, _ in read]).reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return Source(
        "CIFAR-10",
        list(CIFAR10_CLASSES),
        np.concatenate([labels for _, labels in read]),
        lambda number: images[number],
        lambda number: f"image {number}",
    )


def _read_binary(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(content, dtype=np.uint8)
    if len(records) == 0 or len(records) % 3073:
        raise InputError(f"{name} is not a batch of CIFAR-10: {len(records)} bytes are not a multiple of 3073")
    records = records.reshape(-1, 3073)  # a byte of label, then 3072 of pixels
    return records[:, 1:], _checked_labels(name, records[:, 0].astype(np.int64))


def _read_python(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _InertUnpickler(io.BytesIO(content), encoding="latin1").load()
        data = np.frombuffer(batch["data"].buffer(), dtype=np.uint8).reshape(-1, 3072)
        labels = np.array(batch["labels"], dtype=np.int64)
    except (pickle.UnpicklingError, KeyError, AttributeError, EOFError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{name} is not a batch of CIFAR-10's python archive: {error}") from None
    if len(labels) != len(data):
        raise InputError(f"{name} is not a batch of CIFAR-10: {len(data)} images and {len(labels)} labels")
    return data, _checked_labels(name, labels)


def _checked_labels(name: str, labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() > 9:
        raise InputError(f"{name}: label {labels.max()} is out of CIFAR-10's range 0..9")
    return labels


class _InertArray:
    """A stand-in for numpy.ndarray in a pickle: keeps the state that it is given and does nothing with it."""

    def __init__(self, *_: Any):
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def buffer(self) -> bytes:
        content = self._state[-1]  # (version, shape, dtype, is_fortran, bytes)
        return content.encode("latin1") if isinstance(content, str) else content


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for _codecs.encode, which Python 3's pickles of bytes name."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


class _InertUnpickler(pickle.Unpickler):
    """A reader of the containers, numbers and strings of a pickle; it imports and calls nothing that the pickle names."""

    _STAND_INS = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _InertArray,
        ("numpy._core.multiarray", "_reconstruct"): _InertArray,
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertArray,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs")
        return self._STAND_INS[(module, name)]
