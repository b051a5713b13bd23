"""A source to a folder of shards: shuffled, encoded by threads, written under a temporary name, then renamed.

The same source and options give the same bytes. A crash leaves a hidden folder that no reader mistakes for a data set.
"""

import errno
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from shardstep.configs.cores import pool_threads
from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import file_lock
from shardstep.configs.files import sync_to_disk
from shardstep.configs.text import count, listed, printable
from shardstep.datasets.class_names import doubtful_names_note
from shardstep.datasets.decode import problem_of_start
from shardstep.datasets.input_files import IMAGE_EXTENSIONS
from shardstep.datasets.label_sets import LabelSets, samples_per_class, strata
from shardstep.datasets.manifest import MANIFEST_NAME, Manifest, open_shards
from shardstep.datasets.progress import progress_bar
from shardstep.datasets.rng import permutation
from shardstep.datasets.scan import MOST_NAMED, index_shards
from shardstep.datasets.sources import open_source
from shardstep.datasets.sources.class_folders import split_in_name
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import NO_OPTIONS, LabelOptions
from shardstep.datasets.stored_images import ImageOptions, StoredImage, stored_image
from shardstep.datasets.tar_labels import NUMBERS_IN_CLS, SEVERAL_IN_JSON

AS_STORED = ImageOptions()
BadImages = Literal["refuse", "skip"]
SAMPLES_PER_SHARD = 1000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ENCODE_TOGETHER = 64  # images per task of the pool
_LOOK_TOGETHER = 1024
_QUICKLY_DECODED = 10_000  # images, in a minute or so: of more, what cannot be used is not first found at the end


@dataclass(frozen=True)
class _BadImage:
    """An image that cannot be used."""

    name: str
    problem: str

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.problem}")


@dataclass(frozen=True)
class _Written:
    """What became of the images: those that cannot be used, in the order of the source, how many were read, and whether any
    that was written was a file."""

    bad: list[_BadImage]
    seen: int
    have_files: bool


def write_shards(
    source: str,
    split: str,
    out: Path,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    limit: int | None = None,
    bad_images: BadImages = "refuse",
    classes_of: Path | None = None,
    labels: LabelOptions = NO_OPTIONS,
    options: ImageOptions = AS_STORED,
) -> Manifest:
    """Write one split of a source as WebDataset shards with a manifest and an index.

    Args:
        source: a name or path, see datasets/sources/__init__.py.
        out: folder to create; if it exists, it must be empty.
        samples_per_shard: samples per tar; the last one holds the rest.
        seed: of the shuffle. Shards sorted by class would ruin every windowed order.
        limit: number of images to choose by the seed, balanced over the classes; None takes all.
        bad_images: whether files that cannot be decoded are an error, or are left out and listed on stderr.
        classes_of: a data set whose classes to use, in its order, whether or not there are images of each.
        labels: the table of labels and its columns, where the source leaves them open.
        options: how the images are stored.

    Raises:
        InputError: the source or images of it cannot be read, it has a class that `classes_of` lacks, or `out` is not empty.
    """
    if samples_per_shard < 1:
        raise InputError(f"{samples_per_shard} samples per shard: write at least 1")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} images: choose at least 1")
    options.check()
    out = out.expanduser().resolve()
    with file_lock(out.parent / f".{out.name}.lock"):
        images = open_source(source, split, labels)
        if classes_of is not None:
            images = images.in_classes(open_shards(classes_of).manifest.classes, str(classes_of))
        if not images.has_splits and split_in_name(Path(source).name) != split:
            images.notes.append(
                f"{source} does not say which images are for {split}: all of them are taken. Give each split a source of its "
                f"own, or sort it into train/ and test/"
            )
        return _write_locked(images, source, split, out, samples_per_shard, seed, limit, bad_images, options)


def balanced_choice(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Return the numbers of `limit` images, chosen by a seed, with class sizes that differ by at most one.

    A class that is too small for that is chosen completely. Choices of the same seed are nested: a smaller one is part of
    a larger one.

    Raises:
        InputError: there are fewer images.
    """
    if limit > len(labels):
        raise InputError(f"a limit of {limit:,} images, but there are {len(labels):,}: omit it to write all")
    shuffled = permutation(len(labels), (seed, 0), (1, 0, 0))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class by class
    begins = np.searchsorted(labels[shuffled], labels[shuffled])
    turn = np.arange(len(labels)) - begins  # place of an image in its class
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:limit]])  # first the first image of each class, and so on


def make_missing_shards(
    source: str,
    split: str,
    out: Path,
    labels: LabelOptions = NO_OPTIONS,
    is_only_split: bool = False,
    options: ImageOptions = AS_STORED,
) -> bool:
    """Write the shards unless they exist or another process of this node writes them; return whether this call did.

    See write_shards for the arguments. `is_only_split`: whether all images of a source without splits may go into this one,
    because there is no other.

    Raises:
        InputError: the source cannot be read or does not separate its splits, or `out` is not empty.
    """
    if (out / MANIFEST_NAME).is_file():
        return False
    out = out.expanduser().resolve()
    with file_lock(out.parent / f".{out.name}.lock"):
        if (out / MANIFEST_NAME).is_file():
            return False
        images = open_source(source, split, labels)
        if not images.has_splits and not is_only_split:
            raise InputError(
                f"data.source={source} has no train/ and test/ folders, nor a table with a column split: both sets would "
                f"hold the same images. Hold a part out with data.validation=0.1 data.test=none, or write each set from its "
                f"own folder with `shardstep shards write --source ...`"
            )
        _write_locked(images, source, split, out, options=options)
        return True


def _write_locked(
    images: Source,
    source: str,
    split: str,
    out: Path,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    limit: int | None = None,
    bad_images: BadImages = "refuse",
    options: ImageOptions = AS_STORED,
) -> Manifest:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; nothing was written. Give a folder")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; nothing was written. Remove it or choose another folder")
    for note in [*images.notes, doubtful_names_note(images.classes)]:
        if note:
            print(printable(note), file=sys.stderr)
    if images.empty_folders:
        raise InputError(
            f"{source} has folders for {split} without images ({', '.join(IMAGE_EXTENSIONS)}): "
            f"{listed(images.empty_folders)}. Add some or remove the folders; `shardstep shards write --classes-of DIR` "
            f"allows classes without images"
        )
    if limit is not None:
        images = images.only(balanced_choice(strata(images.labels), limit, seed))
    total = len(images.labels)
    if bad_images == "refuse" and total > _QUICKLY_DECODED and (bad := _bad_by_their_start(images)):
        raise _bad_images_error(source, bad, f"of {total:,} images")
    # We hold this node's lock, so no other process uses a leftover of this name.
    partial = out.parent / f".{out.name}.{platform.node()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with progress_bar(f"writing {out}", total, "images") as advance:
            order = permutation(total, (seed, 0), (0, 0, 0))
            written = _write_tars(images, order, partial, split, samples_per_shard, options, bad_images, advance)
            bad, seen = written.bad, written.seen
            if bad and (bad_images == "refuse" or len(bad) == total):
                among = f"of {'the first ' if seen < total else ''}{seen:,} images"
                raise _bad_images_error(source, bad, among)
        if bad:
            print(f"left out: {len(bad):,} of {total:,} images", *map(str, bad), sep="\n  - ", file=sys.stderr)
            print(f"left out by kind: {_kinds(bad)}", file=sys.stderr)
        made = {"source": images.description, "split": split, "seed": seed, "samples_per_shard": samples_per_shard}
        made |= (
            options.made(written.have_files)
            | ({} if limit is None else {"limit": limit})
            | ({"left_out": len(bad)} if bad else {})
        )
        with progress_bar(f"checking {out}", total - len(bad), "images") as advance:
            field = SEVERAL_IN_JSON if isinstance(images.labels, LabelSets) else NUMBERS_IN_CLS
            manifest = index_shards(partial, made, images.classes, advance, label_field=field)
        before = samples_per_class(images.labels, len(images.classes)).tolist()
        counts = zip(images.classes, before, manifest.samples_per_class, strict=True)
        emptied = [name for name, given, kept in counts if given and not kept]
        if isinstance(images.labels, LabelSets) and (unlabelled := int(np.sum(np.diff(images.labels.starts) == 0))):
            print(f"{count(unlabelled, 'image')} of {total:,} without a label", file=sys.stderr)
        if emptied:
            print(f"left out: all images of {listed(emptied)}", file=sys.stderr)
        for file in partial.iterdir():
            sync_to_disk(file)
        partial.replace(out)
        sync_to_disk(out.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:  # the error has no filename, or that of a file that is removed below
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_tars(
    images: Source,
    order: np.ndarray,
    folder: Path,
    split: str,
    samples_per_shard: int,
    options: ImageOptions,
    bad_images: BadImages,
    advance: Callable[[int], None],
) -> _Written:
    """Write the images that can be decoded. If so many are to be refused that they are of a kind, not all are read."""
    from webdataset import TarWriter

    bad: dict[int, _BadImage] = {}
    seen, have_files = 0, False
    anew: Counter[str] = Counter()  # images that were encoded anew, by their former and their new format

    def good_images() -> Iterator[tuple[int, StoredImage]]:
        nonlocal seen, have_files
        for number, stored in zip(order.tolist(), _stored(images, order, options), strict=True):
            if isinstance(stored, ValueError):
                bad[number] = _BadImage(images.name(number), str(stored))
            else:
                have_files |= stored.was_file
                if stored.former:
                    anew[f".{stored.former} as .{stored.extension}"] += 1
                yield number, stored
            seen += 1
            advance(1)
            if bad_images == "refuse" and len(bad) >= MOST_NAMED and seen >= _QUICKLY_DECODED:
                return

    width = max(6, len(str(len(order) - 1)))
    for shard, rows in groupby(enumerate(good_images()), lambda row: row[0] // samples_per_shard):
        # mtime 0 and no user names: the same input gives the same bytes
        with TarWriter(str(folder / f"{split}-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
            for row, (number, stored) in rows:
                extension = _with_its_name(stored.extension, images.name(number))
                tar.write({"__key__": f"{row:0{width}d}", extension: stored.data} | _label(images, number))
    if anew:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in anew.most_common())
        print(f"stored in another format: {kinds} (of {len(order):,} images)", file=sys.stderr)
    return _Written([bad[number] for number in sorted(bad)], seen, have_files)


def _bad_by_their_start(images: Source) -> list[_BadImage]:
    """Return the problems of images whose first bytes show that they cannot be decoded, in the order of the source."""
    from shardstep.datasets.batches import read_ahead

    if images.start is None:
        return []

    def bad(number: int) -> _BadImage | None:
        assert images.start is not None
        try:
            problem = problem_of_start(images.start(number))
        except ValueError as error:
            problem = str(error)
        return _BadImage(images.name(number), problem) if problem else None

    groups = iter(np.split(np.arange(len(images.labels)), range(_LOOK_TOGETHER, len(images.labels), _LOOK_TOGETHER)))
    looks = read_ahead(groups, lambda group: lambda: [bad(number) for number in group.tolist()], pool_threads())
    return [found for group in looks for found in group if found]


def _bad_images_error(source: str, bad: list[_BadImage], among: str) -> InputError:
    remedy = "fix or remove them, or leave them out with `shardstep shards write --bad-images skip`"
    headline = f"{source} has images that cannot be used ({remedy}; {len(bad):,} {among}, {_kinds(bad)})"
    return InputError.from_problems(headline, [str(image) for image in bad], MOST_NAMED)


def _kinds(bad: list[_BadImage]) -> str:
    """Count the problems of images by their kind, the most frequent first; what is in brackets is of one image."""
    kinds = Counter(image.problem.partition(" (")[0] for image in bad)
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())


def _label(images: Source, number: int) -> dict[str, bytes]:
    """Return the label of an image as a member of its sample: the number, or several names, with shares if one is below 1."""
    if not isinstance(images.labels, LabelSets):
        return {"cls": str(images.labels[number]).encode()}
    shares = {images.classes[label]: float(str(np.float32(share))) for label, share in images.labels.of(number)}
    labels = list(shares) if set(shares.values()) <= {1.0} else shares
    return {"json": json.dumps({"labels": labels}, ensure_ascii=False).encode()}


def _with_its_name(extension: str, name: str) -> str:
    """Return the extension of a JPEG as its name has it: jpg or jpeg."""
    return "jpeg" if extension == "jpg" and name.lower().endswith(".jpeg") else extension


def _stored(images: Source, order: np.ndarray, options: ImageOptions) -> Iterator[StoredImage | ValueError]:
    """Yield the image files in order, or their problems; threads encode and decode a bounded number of tasks ahead."""
    from shardstep.datasets.batches import read_ahead  # here: it imports torch, like webdataset above

    def store(number: int) -> StoredImage | ValueError:
        try:
            return stored_image(images.read(number), options)
        except ValueError as error:
            return error

    groups = iter(np.split(order, range(_ENCODE_TOGETHER, len(order), _ENCODE_TOGETHER)))
    workers = pool_threads()
    for stored in read_ahead(groups, lambda group: lambda: [store(number) for number in group.tolist()], workers):
        yield from stored
