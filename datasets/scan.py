"""Tars to a manifest and an index: every byte is read and hashed, every image decoded, once.

The same code handles the shards that shardstep writes and tars written elsewhere: <key>.<image> beside <key>.cls, a label
in decimal digits. A damaged shard, a sample without its label, a label out of range or an image that cannot be decoded is
an error that names the sample.
"""

import hashlib
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.files import file_sha256
from shardstep.configs.text import count
from shardstep.datasets.decode import EXTENSIONS, decode
from shardstep.datasets.manifest import INDEX_DTYPE, Manifest, Shard, split_name, write_manifest
from shardstep.datasets.tar import BLOCK, read_members

MOST_NAMED = 20  # problems listed in one message
_COUNT_TOGETHER = 250  # images per histogram update, for fewer and larger array operations
_Place = tuple[
    str, int, int
]  # name, offset and size of a Member; the garbage collector passes over plain tuples of these


@dataclass
class _ShardScan:
    """The content of one shard. The histograms count pixel values, so that mean and std are exact in any order."""

    shard: Shard
    entries: np.ndarray
    keys: list[str]
    sizes: set[tuple[int, int]] = field(default_factory=set)
    encodings: set[str] = field(default_factory=set)
    colour: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    grey: np.ndarray = field(default_factory=lambda: np.zeros((1, 256), dtype=np.int64))
    problems: list[str] = field(default_factory=list)


def index_shards(
    folder: Path,
    made: dict[str, Any],
    classes: list[str] | None = None,
    advance: Callable[[int], None] = lambda _: None,
    former_classes: list[str] | None = None,
) -> Manifest:
    """Read every tar in a folder and write its manifest.json and index.

    Args:
        folder: holds the tars; sample ids number the samples in the sorted order of the tars' names.
        made: how the shards were made, for the manifest.
        classes: names by label; None takes `former_classes`, else the numbers from 0 to the largest label.
        advance: called with the number of samples just read.
        former_classes: names to keep if there are enough for the labels.

    Raises:
        InputError: there are no shards, or some are damaged or incomplete; the message lists the problems.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise InputError(f"no .tar files in {folder}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        scans = list(pool.map(lambda number: _scan(number, paths[number], advance), range(len(paths))))
    problems = [problem for scan in scans for problem in scan.problems] + _repeated_keys(scans)
    entries = np.concatenate([scan.entries for scan in scans])
    if not problems and len(entries) == 0:
        problems.append("no samples: looked for <key>.cls beside <key>." + "|".join(EXTENSIONS))
    if not problems and classes is None and former_classes and entries["label"].max() < len(former_classes):
        classes = former_classes
    if not problems and classes is not None and entries["label"].max() >= len(classes):
        problems.append(f"label {entries['label'].max()} is out of range: there are {len(classes)} classes")
    if not problems and classes is None and entries["label"].max() >= len(entries):
        problems.append(
            f"the largest label is {entries['label'].max()}, with {count(len(entries), 'sample')}: give the class names"
        )
    if not problems and classes is not None and (len(set(classes)) < len(classes) or "" in classes):
        problems.append("class names must be unique and not empty")
    if problems:
        raise InputError.from_problems(f"{folder} cannot be indexed", problems, MOST_NAMED)

    if classes is None:
        classes = [str(label) for label in range(int(entries["label"].max()) + 1)]
    colour, grey = sum(scan.colour for scan in scans), sum(scan.grey for scan in scans)
    is_grey = not np.any(colour)
    histogram = np.asarray(grey if is_grey else colour + grey)  # grey images among coloured ones count in each channel
    mean, std = _mean_and_std(histogram)
    sizes = set().union(*(scan.sizes for scan in scans))
    channels = 1 if is_grey else 3
    data = entries.tobytes()
    manifest = Manifest(
        classes=classes,
        samples=len(entries),
        samples_per_class=np.bincount(entries["label"], minlength=len(classes)).tolist(),
        image_mode="L" if is_grey else "RGB",
        image_shape=[channels, *next(iter(sizes))] if len(sizes) == 1 else None,
        encodings=sorted(set().union(*(scan.encodings for scan in scans))),
        mean=mean,
        std=std,
        made=made,
        shards=[scan.shard for scan in scans],
        index_sha256=hashlib.sha256(data).hexdigest(),
    )
    write_manifest(folder, manifest, data)
    return manifest


def _scan(number: int, path: Path, advance: Callable[[int], None]) -> _ShardScan:
    scan = _ShardScan(Shard(path.name, path.stat().st_size, "", 0), np.empty(0, dtype=INDEX_DTYPE), [])
    try:
        images, labels = _pair(path, scan)
    except InputError as error:
        scan.problems.append(str(error))
        return scan
    entries = np.empty(len(images), dtype=INDEX_DTYPE)
    pending: list[np.ndarray] = []
    with path.open("rb") as file:
        for row, (key, (name, offset, size)) in enumerate(images.items()):
            data = os.pread(file.fileno(), size, offset)
            _, label_offset, label_size = labels[key]
            label = _label(os.pread(file.fileno(), label_size, label_offset))
            if label is None:
                scan.problems.append(f"{path.name}: {key}.cls is not a label: it must be an integer from 0")
                label = 0
            entries[row] = number, offset // BLOCK, size, label, zlib.crc32(data)
            try:
                pending.append(decode(data, "UNCHANGED"))
            except ValueError as error:
                scan.problems.append(f"{path.name}: {name}: {error}")
            if len(pending) == _COUNT_TOGETHER or row == len(images) - 1:
                _count(pending, scan)
                advance(len(pending))
                pending.clear()
    scan.entries, scan.keys = entries, list(images)
    scan.shard = Shard(path.name, path.stat().st_size, file_sha256(path), len(entries))
    return scan


def _pair(path: Path, scan: _ShardScan) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Return images and labels of a shard by key, in the order of the images; one without the other is a problem."""
    images: dict[str, _Place] = {}
    labels: dict[str, _Place] = {}
    for name, offset, size in read_members(path):
        key, extension = split_name(name)
        kind = images if extension in EXTENSIONS else labels if extension == "cls" else None
        if kind is None:
            continue  # other parts of a sample, such as .json, are ignored
        if key in kind:
            scan.problems.append(f"{path.name}: {name} occurs twice")
        kind[key] = name, offset, size
        if kind is images:
            scan.encodings.add("jpg" if extension == "jpeg" else extension)
    scan.problems += [f"{path.name}: {images[key][0]} has no label {key}.cls" for key in images if key not in labels]
    scan.problems += [f"{path.name}: {labels[key][0]} has no image" for key in labels if key not in images]
    return {key: image for key, image in images.items() if key in labels}, labels


def _label(text: bytes) -> int | None:
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) < 10 else None


def _count(images: list[np.ndarray], scan: _ShardScan) -> None:
    scan.sizes.update(image.shape[:2] for image in images)
    for histogram in (scan.grey, scan.colour):
        channels = len(histogram)
        chosen = [image.reshape(-1, channels) for image in images if image.shape[2] == channels]
        if chosen:
            values = np.concatenate(chosen)
            for channel in range(channels):
                histogram[channel] += np.bincount(values[:, channel], minlength=256)


def _mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Compute mean and std per channel on the 0..1 scale, from counts of the 256 pixel values; shape (channels, 256)."""
    values = np.arange(256) / 255
    total = histogram.sum(axis=1)
    mean = (histogram * values).sum(axis=1) / total
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return mean.round(8).tolist(), np.sqrt(variance).round(8).tolist()


def _repeated_keys(scans: list[_ShardScan]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for scan in scans:
        for key in scan.keys:
            if key in seen:
                problems.append(f"the key {key} is in {seen[key]} and in {scan.shard.name}")
            seen[key] = scan.shard.name
    return problems
