"""The description of a folder of shards: manifest.json and index, written once, checked whenever it is opened.

manifest.json   classes, counts, image shape, mean and std, how it was made; name, size and SHA-256 of every file
index           20 bytes a sample: shard, offset / 512, size, label, crc32 (five little-endian uint32)
index-labels    only where samples have several labels, see label_sets.py
index-sizes     only where images differ in size: 8 bytes a sample, height and width when upright (little-endian uint32)
"""

import difflib
import hashlib
import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.files import write_atomically
from shardstep.configs.schema import Orientation
from shardstep.configs.text import count
from shardstep.datasets.class_names import class_names_of_manifest
from shardstep.datasets.framing import Framing
from shardstep.datasets.input_files import FolderTree, LeftOut, files_that_end_in, is_hidden, split_name
from shardstep.datasets.label_sets import LABEL_DTYPE, LABELS_NAME, LabelSets, strata
from shardstep.datasets.tar import BLOCK, PACKED_TAR, TAR, read_members

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index"
SIZES_NAME = "index-sizes"
FORMAT_VERSION = 1  # of data sets with one label a sample
SEVERAL_LABELS_VERSION = 2  # 1 with a file `index-labels`
SIZES_VERSION = 3  # either of them with a file `index-sizes`, or with images that must be turned upright
_CHECKED_TOGETHER = 50_000  # entries of an index: a megabyte, which stays in a processor's cache
_HASHES_OF_SOME = ("labels_sha256", "sizes_sha256")
CHANNELS = {"RGB": 3, "L": 1}  # of the modes that images are read in
_MOST_LEVELS = 3  # of folders that do not exist, below one that does, to look for data sets beside
_MOST_COPIED = 64 << 20  # bytes of an index, those of 3.3 million samples, that each process keeps for itself

# Image data in a tar starts at a multiple of 512, so 32 bits reach 2 TiB into a shard.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("block", "<u4"), ("size", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
SIZE_DTYPE = np.dtype([("height", "<u4"), ("width", "<u4")])


@dataclass(frozen=True)
class Shard:
    """One tar: size and SHA-256 of the file, and the number of its samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    classes: list[str]  # names; the index is the label
    samples: int
    samples_per_class: list[int]  # in the order of `classes`
    image_mode: str  # "RGB", or "L" when every image is greyscale
    image_shape: list[int] | None  # (channels, height, width); None if sizes differ (then data.resize is needed)
    encodings: list[str]  # file name extensions of the images, such as ["png"]
    mean: list[float]  # per channel over all pixels, on the 0..1 scale, like `std`
    std: list[float]
    made: dict[str, Any]  # how the shards were made
    shards: list[Shard]  # in the order of the sample ids
    index_sha256: str
    format_version: int = FORMAT_VERSION
    labels_sha256: str = ""  # of the file `index-labels`; empty where each sample has one label
    sizes_sha256: str = ""  # of the file `index-sizes`; empty where all images have the size in `image_shape`
    fingerprint: str = ""  # SHA-256 over all of the above; identifies the data set in caches, checkpoints, summaries

    @property
    def channels(self) -> int:
        return CHANNELS[self.image_mode]

    def shape_when_read(self, framing: Framing | None, image_mode: str | None = None) -> tuple[int, int, int] | None:
        """Return (height, width, channels) of the images as they are read; None if they differ in size.

        Args:
            framing: how they are cut and scaled; None keeps their size.
            image_mode: "RGB" or "L", if they are read like those of another set.
        """
        sides = [framing.height, framing.width] if framing else self.image_shape and self.image_shape[1:]
        return (sides[0], sides[1], CHANNELS[image_mode or self.image_mode]) if sides else None

    @property
    def bytes(self) -> int:
        """Total size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def first_label(self) -> int:
        """The label of class 0 in the tars: 0, unless others wrote them and counted from another number."""
        return int(self.made.get("first_label", 0))

    @property
    def has_several_labels(self) -> bool:
        """Whether samples have several labels, or none, or shares of labels; else each has one."""
        return self.labels_sha256 != ""

    @property
    def orientation(self) -> Orientation:
        """Whether its pictures are turned upright, as EXIF says; sets of earlier versions are read as they are stored."""
        return "follow" if self.made.get("orientation") == "follow" else "ignore"

    @property
    def orientation_when_read(self) -> Orientation:
        """How its images are decoded: where none of them is turned, there is nothing to look for."""
        return self.orientation if self.made.get("turned") else "ignore"

    def content(self) -> dict[str, Any]:
        """Return the content of manifest.json, without the hashes of files that the data set does not have."""
        return {key: value for key, value in asdict(self).items() if value or key not in _HASHES_OF_SOME}

    def computed_fingerprint(self) -> str:
        content = {key: value for key, value in self.content().items() if key != "fingerprint"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest, index: bytes, labels: bytes = b"", sizes: bytes = b"") -> None:
    """Write index, labels, sizes and manifest.json; the manifest last, because a folder without one is not a data set."""
    write_atomically(folder / INDEX_NAME, index)
    if manifest.has_several_labels:
        write_atomically(folder / LABELS_NAME, labels)
    if manifest.sizes_sha256:
        write_atomically(folder / SIZES_NAME, sizes)
    write_atomically(folder / MANIFEST_NAME, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of manifest.json."""
    content = manifest.content() | {"fingerprint": manifest.computed_fingerprint()}
    return json.dumps(content, indent=1).encode() + b"\n"


def parse_manifest(text: str, where: str) -> Manifest:
    """Parse the text of a manifest.json.

    Raises:
        InputError: it is not a manifest, is damaged, or has a later format version.
    """
    try:
        content = json.loads(text)
        version = content.get("format_version")
        if isinstance(version, int) and version > SIZES_VERSION:
            raise InputError(
                f"{where} has format version {version}; this version of shardstep reads 1 to {SIZES_VERSION}"
            )
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        manifest = Manifest(**content)
        fingerprint = manifest.computed_fingerprint()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where} is damaged or not a manifest of shards: {error}") from None
    if manifest.fingerprint != fingerprint:
        raise InputError(
            f"{where} is damaged: its content does not match its fingerprint. Write the shards again, or, if you trust "
            f"them, recreate it with `shardstep shards index DIR --force --classes NAME,NAME,...`"
        )
    return replace(manifest, classes=class_names_of_manifest(manifest.classes))


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """Check and read the index of a folder; INDEX_DTYPE, shape (samples,).

    A large one is mapped, so that the processes of a node share it; in place it must not change while one of them runs.

    Raises:
        InputError: it is missing, or not the index that was written with the manifest.
    """
    path = folder / INDEX_NAME
    entries, largest_label = _read_entries(path, INDEX_DTYPE, manifest.index_sha256)
    if len(entries) != manifest.samples:
        raise InputError(
            f"{path} has {count(len(entries), 'entry', 'entries')} for {count(manifest.samples, 'sample')}"
        )
    if len(entries) and largest_label >= len(manifest.classes) and not manifest.has_several_labels:
        raise InputError(f"{path}: label {largest_label} is out of range: {len(manifest.classes)} classes")
    return entries


def read_label_sets(folder: Path, manifest: Manifest, index: np.ndarray) -> LabelSets | None:
    """Check and read the labels of a folder whose samples have several; None if each has one.

    Raises:
        InputError: they are missing, or not those that were written with the manifest.
    """
    if not manifest.has_several_labels:
        return None
    path = folder / LABELS_NAME
    entries, largest_label = _read_entries(path, LABEL_DTYPE, manifest.labels_sha256)
    starts = np.append(index["label"], len(entries)).astype(np.int64)
    if (len(entries) and largest_label >= len(manifest.classes)) or starts[0] != 0 or np.any(np.diff(starts) < 0):
        raise InputError(f"{path} does not fit {folder / INDEX_NAME}: recreate both with {_index_command(folder)}")
    return LabelSets(starts, entries)


def read_sizes(folder: Path, manifest: Manifest) -> np.ndarray | None:
    """Check and read the sizes of a folder's images: SIZE_DTYPE, shape (samples,); None where they are not in the index.

    Raises:
        InputError: they are missing, or not those that were written with the manifest.
    """
    if not manifest.sizes_sha256:
        return None
    sizes, _ = _read_entries(folder / SIZES_NAME, SIZE_DTYPE, manifest.sizes_sha256)
    if len(sizes) != manifest.samples:
        which = f"{count(len(sizes), 'entry', 'entries')} for {count(manifest.samples, 'sample')}"
        raise InputError(f"{folder / SIZES_NAME} has {which}: recreate it with {_index_command(folder)}")
    return sizes


def _read_entries(path: Path, dtype: np.dtype, sha256: str) -> tuple[np.ndarray, int]:
    """Return the entries of a file and the largest label in it, if it has any, after a check of its SHA-256."""
    digest, largest_label = hashlib.sha256(), 0
    if not path.is_file():
        raise InputError(f"{path} is missing. Recreate it with {_index_command(path.parent)}")
    size, copied = path.stat().st_size, list[bytes]()
    # Read even if it is mapped afterwards: pages of a map would count as memory of this process.
    with path.open("rb") as file:
        while data := file.read(_CHECKED_TOGETHER * dtype.itemsize):
            digest.update(data)
            if size <= _MOST_COPIED:
                copied.append(data)
            entries = np.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
            if "label" in (dtype.names or ()):
                largest_label = max(largest_label, int(entries["label"].max(initial=0)))
    if digest.hexdigest() != sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}. Write the shards again, or, if you trust "
            f"them, recreate the manifest with {_index_command(path.parent)}"
        )
    if size % dtype.itemsize:
        raise InputError(f"{path} has {size} bytes, not {dtype.itemsize} for each of its entries")
    if size <= _MOST_COPIED:
        return np.frombuffer(b"".join(copied), dtype=dtype), largest_label
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")), largest_label


@dataclass(frozen=True)
class ShardFolder:
    """An open data set on a local disk: manifest and index are intact, every shard exists and has its size."""

    path: Path
    manifest: Manifest
    index: np.ndarray
    label_sets: LabelSets | None = None  # where samples have several labels
    sizes: np.ndarray | None = None  # SIZE_DTYPE, where images differ in size and the index says how

    def size_of(self, sample_id: int) -> tuple[int, int] | None:
        """Return the height and width of an image when it is upright; None in sets of earlier versions where they differ."""
        if self.manifest.image_shape:
            return self.manifest.image_shape[1], self.manifest.image_shape[2]
        return None if self.sizes is None else self.sizes[sample_id].item()

    @property
    def labels(self) -> np.ndarray | LabelSets:
        """One label each, int64, shape (samples,), or the labels of each."""
        return self.index["label"].astype(np.int64) if self.label_sets is None else self.label_sets

    def labels_of(self, sample_id: int) -> list[tuple[int, float]]:
        """Return the labels of a sample and their shares: 1 for a label that simply holds."""
        if self.label_sets is None:
            return [(int(self.index[sample_id]["label"]), 1.0)]
        return self.label_sets.of(sample_id)

    def targets(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the labels of samples as losses take them: int64, shape (batch,), or shares, float32, (batch, classes)."""
        if self.label_sets is None:
            return self.index["label"][sample_ids].astype(np.int64)
        return self.label_sets.dense(sample_ids, len(self.manifest.classes))

    @property
    def strata(self) -> np.ndarray:
        """What a held-out part has its share of each of: the samples' classes, see strata. int64, shape (samples,)."""
        return strata(self.labels)

    @property
    def samples_per_shard(self) -> list[int]:
        return [shard.samples for shard in self.manifest.shards]

    def shard_path(self, shard: int) -> Path:
        return self.path / self.manifest.shards[shard].name

    def path_of(self, sample_id: int) -> Path:
        """Return the path of the shard that holds a sample."""
        return self.shard_path(int(self.index[sample_id]["shard"]))

    def key(self, sample_id: int) -> str:
        """Return the WebDataset key of a sample, from its header in the tar."""
        shard = int(self.index[sample_id]["shard"])
        with self.shard_path(shard).open("rb") as file:
            return self._key_in(file, shard, sample_id)

    def keys(self) -> list[str]:
        """Return the keys of all samples; opens each shard once."""
        found = []
        for shard, ids in itertools.groupby(range(len(self.index)), key=self.index["shard"].tolist().__getitem__):
            with self.shard_path(shard).open("rb") as file:
                found += [self._key_in(file, shard, sample_id) for sample_id in ids]
        return found

    def _key_in(self, file: BinaryIO, shard: int, sample_id: int) -> str:
        place = int(self.index["block"][sample_id]) * BLOCK
        file.seek(place - BLOCK)
        header = file.read(BLOCK)
        name = header[:100].partition(b"\0")[0].decode(errors="replace")
        if len(name) >= 99 or "?" in name or header[345:346] != b"\0":  # the full name may be in a separate header
            members = read_members(self.shard_path(shard))
            name = next((member.name for member in members if member.offset == place), name)
        return split_name(name)[0]


def check_same_kind(sets: Sequence[tuple[str, Manifest]]) -> None:
    """Check that the images of all sets, given with their names, have one label each, or those of all several.

    Raises:
        InputError: they have not.
    """
    several, single = ([name for name, one in sets if one.has_several_labels is kind] for kind in (True, False))
    if several and single:
        raise InputError(
            f"the images of {several[0]} have several labels, those of {single[0]} one each: write both from labels of one "
            f"kind"
        )


def open_shards(path: str | Path) -> ShardFolder:
    """Open a folder of shards; sizes are checked now, contents (crc32) when samples are read.

    Raises:
        InputError: the folder is missing, empty or incomplete, or a file is missing or has the wrong size.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"no shards in {folder}: the folder does not exist{did_you_mean(folder)}. Write them with "
            f"`shardstep shards write`, or let a recipe write them with data.source"
        )
    if not (folder / MANIFEST_NAME).is_file():
        paths, left_out = find_tars(folder, TAR + PACKED_TAR)
        command = shlex.join(["shardstep", "shards", "index", str(folder)])
        remedy = f"index them with `{command}`" if paths else "write some with `shardstep shards write`"
        near = "" if paths else did_you_mean(folder)
        if not paths and not near and (line := left_out.line(folder, files_that_end_in(TAR))):
            near = f" ({line})"
        tars = count(len(paths), "tar file")
        raise InputError(f"no data set in {folder}: {tars} and no {MANIFEST_NAME}{near}; {remedy}")
    manifest = parse_manifest((folder / MANIFEST_NAME).read_text(errors="replace"), str(folder / MANIFEST_NAME))
    problems = [problem for shard in manifest.shards if (problem := size_problem(folder / shard.name, shard.bytes))]
    if problems:
        raise InputError.from_problems(f"{folder} does not match its manifest", problems)
    index = read_index(folder, manifest)
    if manifest.samples == 0:
        raise InputError(f"{folder} holds no samples")
    return ShardFolder(folder, manifest, index, read_label_sets(folder, manifest, index), read_sizes(folder, manifest))


def did_you_mean(path: str | Path) -> str:
    """Return a hint at data sets near a folder that holds none: around it, in it, or of a similar name; empty without any."""
    folder = Path(path).expanduser()
    above = next((place for place in folder.parents if place.is_dir()), None)
    if above is None or above == Path("/"):  # too many folders to look into
        return ""
    near = [str(place) for place in (above, *sorted(folder.glob("*"))) if (place / MANIFEST_NAME).is_file()]
    levels = len(folder.parts) - len(above.parts)
    if not near and levels <= _MOST_LEVELS:
        found = {str(place.parent.relative_to(above)) for place in above.glob("*/" * levels + MANIFEST_NAME)}
        close = difflib.get_close_matches(str(folder.relative_to(above)), sorted(found), cutoff=0.7)
        near = [str(above / place) for place in close]
    return f" (did you mean {' or '.join(near[:3])}?)" if near else ""


def _index_command(folder: Path) -> str:
    """Return the command that writes manifest and index again; it keeps the class names of an intact manifest."""
    return f"`{shlex.join(['shardstep', 'shards', 'index', str(folder), '--force'])}`"


def find_tars(folder: Path, endings: tuple[str, ...] = TAR) -> tuple[list[Path], LeftOut]:
    """Return the tars in a folder, by their endings, sorted, whether or not they can be read, and what else is there."""
    tars, left_out = [], LeftOut()
    for entry in sorted(FolderTree(folder).entries(""), key=lambda entry: entry.name):
        if entry.name.lower().endswith(endings) and entry.kind != "folder" and not is_hidden(entry.name):
            tars.append(folder / entry.name)
        elif entry.name not in (MANIFEST_NAME, INDEX_NAME, LABELS_NAME, SIZES_NAME):
            left_out.add_entry(entry.name, entry)
    return tars, left_out


def size_problem(path: Path, expected: int) -> str | None:
    """Check that a shard exists and has its size; return the problem, if any."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size == expected:
        return None
    return f"{path.name} is {'cut off' if size < expected else 'extended'}: {size:,} bytes, {expected:,} when written"
