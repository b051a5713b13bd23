"""The classification data sets of torchvision, by name, as Sources: found in $TORCHVISION_SOURCE, else downloaded by it.

What torchvision leaves as it was published is put right here: EMNIST's images lie on their side, its letters count from 1.
"""

import inspect
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import file_lock
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.input_files import read_file
from shardstep.datasets.sources.source import Source, is_fifth_of_class

_Arguments = tuple[dict[str, Any], ...]  # for torchvision's class, once for each of its splits that are read
_BY_FLAG: tuple[_Arguments, _Arguments] = ({"train": True},), ({"train": False},)
_BY_SPLIT: tuple[_Arguments, _Arguments] = ({"split": "train"},), ({"split": "test"},)
_WITH_VAL: tuple[_Arguments, _Arguments] = ({"split": "train"}, {"split": "val"}), ({"split": "test"},)
_WITH_TRAINVAL: tuple[_Arguments, _Arguments] = ({"split": "trainval"},), ({"split": "test"},)
_DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class TorchvisionSet:
    """How a data set of torchvision is opened and read. Its validation images, if it has some, are training images here."""

    dataset: str  # the class in torchvision.datasets
    train: _Arguments
    test: _Arguments  # none: a fifth of each class is for testing
    classes: list[str] | None = None  # instead of torchvision's names
    samples: Callable[[Any], Iterable[tuple[Any, int]]] = lambda dataset: map(dataset.__getitem__, range(len(dataset)))
    first_label: int = 0
    is_transposed: bool = False


def _emnist(which: str, first_label: int = 0) -> TorchvisionSet:
    train, test = ({"split": which, **arguments} for (arguments,) in _BY_FLAG)
    return TorchvisionSet("EMNIST", (train,), (test,), first_label=first_label, is_transposed=True)


TORCHVISION_SETS = {
    "cifar100": TorchvisionSet("CIFAR100", *_BY_FLAG),
    "mnist": TorchvisionSet("MNIST", *_BY_FLAG, _DIGITS),
    "fashion_mnist": TorchvisionSet("FashionMNIST", *_BY_FLAG),
    "kmnist": TorchvisionSet("KMNIST", *_BY_FLAG),
    "emnist": _emnist("balanced"),
    "emnist_byclass": _emnist("byclass"),
    "emnist_bymerge": _emnist("bymerge"),
    "emnist_letters": _emnist("letters", first_label=1),
    "emnist_digits": _emnist("digits"),
    "usps": TorchvisionSet("USPS", *_BY_FLAG, _DIGITS),
    "svhn": TorchvisionSet("SVHN", *_BY_SPLIT, _DIGITS),
    "stl10": TorchvisionSet("STL10", *_BY_SPLIT),
    "food101": TorchvisionSet("Food101", *_BY_SPLIT),
    "flowers102": TorchvisionSet("Flowers102", *_WITH_VAL),
    "oxford_pets": TorchvisionSet(
        "OxfordIIITPet", *_WITH_TRAINVAL, samples=lambda dataset: zip(dataset._images, dataset._labels, strict=True)
    ),
    "fgvc_aircraft": TorchvisionSet("FGVCAircraft", *_WITH_TRAINVAL),
    "dtd": TorchvisionSet("DTD", *_WITH_VAL),
    "gtsrb": TorchvisionSet(
        "GTSRB", *_BY_SPLIT, [str(label) for label in range(43)], samples=lambda dataset: dataset._samples
    ),
    "country211": TorchvisionSet("Country211", ({"split": "train"}, {"split": "valid"}), ({"split": "test"},)),
    "rendered_sst2": TorchvisionSet("RenderedSST2", *_WITH_VAL),
    "imagenette": TorchvisionSet("Imagenette", ({"split": "train"},), ({"split": "val"},)),
    "imagenette_160": TorchvisionSet(
        "Imagenette", ({"split": "train", "size": "160px"},), ({"split": "val", "size": "160px"},)
    ),
    "eurosat": TorchvisionSet("EuroSAT", ({},), ()),
    "sun397": TorchvisionSet("SUN397", ({},), ()),
}
_OF_TORCHVISION = " of torchvision"


def open_torchvision_set(name: str, split: str) -> Source:
    """Return one split, "train" or "test", of the data set of this name in TORCHVISION_SETS.

    Raises:
        InputError: it is not in $TORCHVISION_SOURCE, or could not be downloaded.
    """
    chosen = TORCHVISION_SETS[name]
    given = os.environ.get("TORCHVISION_SOURCE")
    root = Path(given).expanduser() if given else _download(name, chosen)
    try:
        datasets = [
            _open(chosen, arguments, root) for arguments in (chosen.test if split == "test" else chosen.train) or ({},)
        ]
        samples = [sample for dataset in datasets for sample in chosen.samples(dataset)]
    except Exception as error:  # what torchvision raises for files that are missing or damaged is of any class
        remedy = (
            "TORCHVISION_SOURCE names a folder that torchvision downloaded to"
            if given
            else "remove it to download again"
        )
        raise InputError(f"{name} cannot be read from {root}: {_line(error)}; {remedy}") from None
    if not samples:
        raise InputError(f"{name} has no {split} images in {root}")
    if isinstance(samples[0][0], str | Path):  # torchvision lists some folders as the disk does
        samples.sort(key=lambda sample: str(sample[0]))
    labels = np.array([label for _, label in samples], dtype=np.int64) - chosen.first_label
    if not chosen.test:
        kept = np.flatnonzero(is_fifth_of_class(labels) == (split == "test"))
        samples, labels = [samples[number] for number in kept.tolist()], labels[kept]
    classes = (
        chosen.classes or [one if isinstance(one, str) else one[0] for one in datasets[0].classes][chosen.first_label :]
    )
    return Source(
        name + _OF_TORCHVISION,
        classes,
        labels,
        lambda number: _content(samples[number][0], chosen.is_transposed),
        lambda number: _name(samples[number][0], number, root),
    )


def is_another_set(description: str, name: str) -> bool:
    """Check whether a Source's description is that of another data set of torchvision."""
    return description.endswith(_OF_TORCHVISION) and description != name + _OF_TORCHVISION


def _open(chosen: TorchvisionSet, arguments: dict[str, Any], root: Path, download: bool = False) -> Any:
    """Return torchvision's data set; one that has a loader gives paths instead of images."""
    from torchvision import datasets

    kind = getattr(datasets, chosen.dataset)
    loader = {"loader": Path} if "loader" in inspect.signature(kind).parameters else {}
    return kind(str(root), download=download, **arguments, **loader)


def _download(name: str, chosen: TorchvisionSet, tries: int = 3) -> Path:
    """Download all splits of a data set once, into the cache folder. They appear by rename, when all is unpacked."""
    root = cache_folder() / "downloads" / name
    problem = ""
    with file_lock(root.parent / f".{name}.lock"):
        if root.is_dir():
            return root
        partial = root.with_name(f"{name}.partial")
        shutil.rmtree(
            partial, ignore_errors=True
        )  # of a killed download: torchvision takes half an archive's files for all
        partial.mkdir(parents=True)
        for _ in range(tries):
            try:
                for arguments in chosen.train + chosen.test:
                    _open(chosen, arguments, partial, download=True)
                partial.rename(root)
                return root
            except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
                problem = _line(error)
        shutil.rmtree(partial, ignore_errors=True)
    raise InputError(
        f"{name} could not be downloaded by torchvision.datasets.{chosen.dataset} in {tries} tries ({problem}). Without a "
        f"network, point TORCHVISION_SOURCE at a folder that torchvision downloaded it to, or use another source"
    )


def _content(sample: Any, is_transposed: bool) -> bytes | np.ndarray:
    """Return a file's bytes, or pixels."""
    if isinstance(sample, str | Path):
        return read_file(Path(sample))
    pixels = np.asarray(sample)
    pixels = pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels.swapaxes(0, 1)) if is_transposed else pixels


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name(sample: Any, number: int, root: Path) -> str:
    return os.path.relpath(sample, root) if isinstance(sample, str | Path) else f"image {number}"
