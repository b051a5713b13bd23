"""Tars to a manifest and an index: every byte is read and hashed, every image decoded, once.

The same code handles the shards that shardstep writes and tars written elsewhere: <key>.<image> beside <key>.cls, a label
in decimal digits, or beside another field with a number, a name or, in JSON, several of them. A damaged shard, a sample
without its label, a label out of range or an image that cannot be decoded is an error that names the sample. Members and
files that belong to no sample are counted on stderr.
"""

import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardstep.configs.cores import pool_threads
from shardstep.configs.errors import InputError
from shardstep.configs.files import file_sha256
from shardstep.configs.schema import Orientation
from shardstep.configs.text import printable
from shardstep.datasets.decode import EXTENSIONS, RARE_EXTENSIONS, decode
from shardstep.datasets.input_files import IMAGE_EXTENSIONS, LeftOut, files_that_end_in, is_hidden, split_name
from shardstep.datasets.label_sets import LabelSets, NamedLabel, names_in, samples_per_class
from shardstep.datasets.manifest import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    SEVERAL_LABELS_VERSION,
    SIZE_DTYPE,
    SIZES_VERSION,
    Manifest,
    Shard,
    find_tars,
    write_manifest,
)  # fmt: skip
from shardstep.datasets.orientation import UPRIGHT, turn_of
from shardstep.datasets.tar import BLOCK, PACKED_TAR, TAR, read_members
from shardstep.datasets.tar_labels import NUMBERS_IN_CLS, LabelField, Numbering, number_labels

NAMES = "names"  # in a manifest: labels in the tars are the names of classes, not their numbers
MOST_NAMED = 20  # problems listed in one message
_COUNT_TOGETHER = 250  # images per histogram update, for fewer and larger array operations
# Name, offset and size of a Member; the garbage collector passes over plain tuples of these.
_Place = tuple[str, int, int]


@dataclass
class _ShardScan:
    """The content of one shard. The histograms count pixel values, so that mean and std are exact in any order."""

    shard: Shard
    entries: np.ndarray  # whose labels are places in `labels`
    keys: list[str]
    labels: list[NamedLabel] = field(default_factory=list)  # that occur, as they are in the tar
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=SIZE_DTYPE))  # of the images, upright
    turned: int = 0  # images that are turned upright
    encodings: set[str] = field(default_factory=set)
    colour: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    grey: np.ndarray = field(default_factory=lambda: np.zeros((1, 256), dtype=np.int64))
    problems: list[str] = field(default_factory=list)
    lacks_labels: bool = False  # all of its images
    left_out: LeftOut = field(default_factory=LeftOut)

    def add_problem(self, member: str, what: str) -> None:
        self.problems.append(printable(f"{self.shard.name}: {member} {what}"))


def index_shards(
    folder: Path,
    made: dict[str, Any],
    classes: list[str] | None = None,
    advance: Callable[[int], None] = lambda _: None,
    former_classes: list[str] | None = None,
    label_field: LabelField = NUMBERS_IN_CLS,
) -> Manifest:
    """Read every tar in a folder and write its manifest.json and index.

    Args:
        folder: holds the tars; sample ids number the samples in the sorted order of the tars' names.
        made: how the shards were made, for the manifest; its "first_label" is the label of class 0, if that is not 0, its
            "orientation" whether pictures are turned upright ("follow") or read as they are stored.
        classes: names by label; None takes `former_classes`, else the numbers from the first to the largest label.
        advance: called with the number of samples just read.
        former_classes: names to keep if there are enough for the labels.
        label_field: where the labels are.

    Raises:
        InputError: there are no shards, or some are damaged or incomplete; the message lists the problems.
    """
    paths, left_out = find_tars(folder, TAR + PACKED_TAR)
    if not paths:
        others = f"; {line}" if (line := left_out.line(folder, files_that_end_in(TAR))) else ""
        raise InputError(f"no .tar files in {folder}{others}")
    first_label = int(made.get("first_label", 0))
    orientation: Orientation = "follow" if made.get("orientation") == "follow" else "ignore"
    with ThreadPoolExecutor(pool_threads()) as pool:
        read = partial(
            _scan, label_field=label_field, first_label=first_label, orientation=orientation, advance=advance
        )
        scans = list(pool.map(read, range(len(paths)), paths))
    for scan in scans:
        left_out.update(scan.left_out)
    looked_for = f"<key>.{label_field.extension} beside <key>.{'|'.join(IMAGE_EXTENSIONS)}"
    if line := left_out.line(folder, f"samples of {looked_for} in .tar files"):
        print(printable(line), file=sys.stderr)
    found = _numbering(scans, folder, looked_for, label_field, first_label, classes, former_classes)

    if label_field.may_be_name:
        made = made | {"label_field": str(label_field)} | ({"labels": NAMES} if found.are_names else {})
    several = label_field.always_several or any(_is_several(label) for scan in scans for label in scan.labels)
    classes = found.classes
    entries = np.concatenate([scan.entries for scan in scans])
    sets = _labels_of_samples(scans, found.label_of) if several else None
    if sets:
        made["several_labels"], entries["label"] = True, sets.starts[:-1]
    else:
        entries["label"] = np.concatenate([_single_labels(scan, found.label_of) for scan in scans])
    colour, grey = sum(scan.colour for scan in scans), sum(scan.grey for scan in scans)
    is_grey = not np.any(colour)
    histogram = np.asarray(grey if is_grey else colour + grey)  # grey images among coloured ones count in each channel
    mean, std = _mean_and_std(histogram)
    sizes = np.concatenate([scan.sizes for scan in scans])
    same_size, turned = len(np.unique(sizes)) == 1, sum(scan.turned for scan in scans)
    made = made | ({"turned": turned} if turned else {})
    channels = 1 if is_grey else 3
    data, label_data, size_data = entries.tobytes(), sets.entries.tobytes() if sets else b"", sizes.tobytes()
    version = SEVERAL_LABELS_VERSION if several else FORMAT_VERSION
    manifest = Manifest(
        classes=classes,
        samples=len(entries),
        samples_per_class=samples_per_class(sets or entries["label"], len(classes)).tolist(),
        image_mode="L" if is_grey else "RGB",
        image_shape=[channels, *sizes[0].item()] if same_size else None,
        encodings=sorted(set().union(*(scan.encodings for scan in scans))),
        mean=mean,
        std=std,
        made=made,
        shards=[scan.shard for scan in scans],
        index_sha256=hashlib.sha256(data).hexdigest(),
        format_version=SIZES_VERSION if turned or not same_size else version,
        labels_sha256=hashlib.sha256(label_data).hexdigest() if several else "",
        sizes_sha256="" if same_size else hashlib.sha256(size_data).hexdigest(),
    )
    write_manifest(folder, manifest, data, label_data, size_data)
    return manifest


def _numbering(
    scans: list[_ShardScan],
    folder: Path,
    looked_for: str,
    label_field: LabelField,
    first_label: int,
    classes: list[str] | None,
    former_classes: list[str] | None,
) -> Numbering:
    """Number the labels that were found; see index_shards for the arguments.

    Raises:
        InputError: something in the shards is damaged or incomplete, or the labels do not fit the classes.
    """
    problems = [problem for scan in scans for problem in scan.problems] + _repeated_keys(scans)
    if not problems and not any(len(scan.entries) for scan in scans):
        problems.append(f"no samples: looked for {looked_for}")
    if not problems:
        try:
            texts = dict.fromkeys(text for scan in scans for label in scan.labels for text in names_in(label))
            samples = sum(len(scan.entries) for scan in scans)
            return number_labels(texts, samples, label_field, first_label, classes, former_classes)
        except InputError as error:
            problems.append(str(error))
    choice = " (--label chooses other files, as txt or json:label)" if all(scan.lacks_labels for scan in scans) else ""
    raise InputError.from_problems(f"{folder} cannot be indexed{choice}", problems, MOST_NAMED)


def _is_several(label: NamedLabel) -> bool:
    return not isinstance(label, str) and [share for _, share in label] != [1.0]


def _single_labels(scan: _ShardScan, label_of: dict[str, int]) -> np.ndarray:
    labels = np.array([label_of[text] for label in scan.labels for text in names_in(label)], dtype=np.uint32)
    return labels[scan.entries["label"]]


def _labels_of_samples(scans: list[_ShardScan], label_of: dict[str, int]) -> LabelSets:
    """Return the labels of all samples, in their order."""
    different = [((label, 1.0),) if isinstance(label, str) else label for scan in scans for label in scan.labels]
    firsts = np.cumsum([0] + [len(scan.labels) for scan in scans])
    numbers = np.concatenate([scan.entries["label"] + first for scan, first in zip(scans, firsts, strict=False)])
    return LabelSets.of_names(different, label_of)[numbers]


def _scan(
    number: int,
    path: Path,
    label_field: LabelField,
    first_label: int,
    orientation: Orientation,
    advance: Callable[[int], None],
) -> _ShardScan:
    scan = _ShardScan(Shard(path.name, 0, "", 0), np.empty(0, dtype=INDEX_DTYPE), [])
    try:
        images, labels = _pair(path, label_field, scan)
    except InputError as error:
        scan.problems.append(str(error))
        return scan
    entries, scan.sizes = np.empty(len(images), dtype=INDEX_DTYPE), np.zeros(len(images), dtype=SIZE_DTYPE)
    pending: list[np.ndarray] = []
    places: dict[NamedLabel, int] = {}  # of the labels that occur
    with path.open("rb") as file:
        for row, (key, (name, offset, size)) in enumerate(images.items()):
            data = os.pread(file.fileno(), size, offset)
            label_name, label_offset, label_size = labels[key]
            label: NamedLabel
            try:
                label = label_field.read(os.pread(file.fileno(), label_size, label_offset), first_label)
            except ValueError as error:
                scan.add_problem(label_name, str(error))
                label = ""
            entries[row] = number, offset // BLOCK, size, places.setdefault(label, len(places)), zlib.crc32(data)
            try:
                pixels = decode(data, "UNCHANGED", orientation)
                scan.sizes[row] = pixels.shape[:2]
                scan.turned += orientation == "follow" and turn_of(data) != UPRIGHT
                pending.append(pixels)
            except ValueError as error:
                scan.add_problem(f"{name}:", str(error))
            if len(pending) == _COUNT_TOGETHER or row == len(images) - 1:
                _count(pending, scan)
                advance(len(pending))
                pending.clear()
    scan.entries, scan.keys, scan.labels = entries, list(images), list(places)
    scan.shard = Shard(path.name, path.stat().st_size, file_sha256(path), len(entries))
    return scan


def _pair(path: Path, label_field: LabelField, scan: _ShardScan) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Return images and labels of a shard by key, in the order of the images; one without the other is a problem."""
    images: dict[str, _Place] = {}
    labels: dict[str, _Place] = {}
    others: list[tuple[str, _Place]] = []  # images of rarer formats: those of a sample that has no other
    for name, offset, size, kind, _ in read_members(path):
        key, extension = split_name(name)
        label_key = label_field.key(name)
        places = labels if label_key is not None else images if extension in EXTENSIONS else None
        key = key if label_key is None else label_key
        if kind == "folder":
            continue
        if is_hidden(name):
            scan.left_out.add("hidden file", f"{path.name}: {name}")
        elif places is None and kind == "file" and extension in RARE_EXTENSIONS:
            others.append((key, (name, offset, size)))
        elif places is None:  # another part of a sample, such as .json
            scan.left_out.add_file(f"{path.name}: {name}")
        elif kind != "file":
            remedy = "pack the files themselves (tar --dereference --hard-dereference)"
            scan.add_problem(name, f"is a {kind}: {remedy}")
        elif key in places:
            former = places[key][0]
            twice = "occurs twice" if former == name else f"has the key of {former}: a sample has one image"
            scan.add_problem(name, twice)
        else:
            places[key] = name, offset, size
    for key, place in others:
        if key in labels and key not in images:
            images[key] = place
        else:
            scan.left_out.add_file(f"{path.name}: {place[0]}")
    images = dict(sorted(images.items(), key=lambda image: image[1][1]))
    scan.lacks_labels = bool(images) and not labels
    samples = images.keys() & labels.keys()
    for places, other in ((images, f"no label {{}}.{label_field.extension}"), (labels, "no image")):
        for key, (name, _, _) in places.items():
            if key not in samples and _belongs_to_another(key, samples):
                scan.left_out.add(
                    "extra image" if places is images else f".{label_field.extension} file", f"{path.name}: {name}"
                )
            elif key not in samples:
                scan.add_problem(name, f"has {other.replace('{}', key)}")
    scan.encodings |= {
        "jpg" if extension == "jpeg" else extension for extension in {split_name(images[key][0])[1] for key in samples}
    }
    return {key: image for key, image in images.items() if key in samples}, labels


def _belongs_to_another(key: str, samples: Set[str]) -> bool:
    """Check whether a file such as 1.depth.png is a further part of the sample 1."""
    folder, slash, base = key.rpartition("/")
    pieces = base.split(".")
    return any(folder + slash + ".".join(pieces[:end]) in samples for end in range(1, len(pieces)))


def _count(images: list[np.ndarray], scan: _ShardScan) -> None:
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
                problems.append(printable(f"the key {key} is in {seen[key]} and in {scan.shard.name}"))
            seen[key] = scan.shard.name
    return problems
