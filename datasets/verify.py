"""Verification of a data set: every byte against the manifest, then every image by decoding it as training will.

Reports each corrupt file and the damaged samples in it, or the images that cannot be decoded.
"""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from shardstep.configs.cores import pool_threads
from shardstep.configs.errors import InputError
from shardstep.configs.files import file_sha256
from shardstep.configs.schema import Orientation
from shardstep.configs.text import printable
from shardstep.datasets import manifest as manifests
from shardstep.datasets.decode import decode
from shardstep.datasets.input_files import split_name
from shardstep.datasets.manifest import MANIFEST_NAME, ShardFolder
from shardstep.datasets.scan import NAMES
from shardstep.datasets.tar import BLOCK, read_members
from shardstep.datasets.tar_labels import NUMBERS_IN_CLS, parse_label_field


def verify_shards(folder: Path, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Compare a folder of shards with its manifest, byte by byte; return one line per problem.

    `advance` is called with the number of samples just checked.

    Raises:
        InputError: the manifest is missing or damaged.
    """
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        raise InputError(f"no data set in {folder}: {MANIFEST_NAME} is missing")
    manifest = manifests.parse_manifest(manifest_path.read_text(errors="replace"), str(manifest_path))

    problems, shards = [], None
    try:
        index = manifests.read_index(folder, manifest)
        shards = ShardFolder(folder, manifest, index, manifests.read_label_sets(folder, manifest, index))
        manifests.read_sizes(folder, manifest)
    except InputError as error:
        problems.append(str(error))

    known = {shard.name for shard in manifest.shards}
    unknown = sorted({path.name for path in manifests.find_tars(folder)[0]} - known)
    problems += [f"{printable(name)} is not in the manifest" for name in unknown]
    by_hash = {shard.sha256: shard.name for shard in manifest.shards}
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name
        wrong_size = manifests.size_problem(path, shard.bytes)
        if wrong_size:
            problems.append(wrong_size)
        if path.is_file():
            digest = file_sha256(path)
            if digest != shard.sha256 and digest in by_hash:
                problems.append(f"{shard.name} holds the bytes of {by_hash[digest]}: they were swapped or copied")
            elif digest != shard.sha256:
                if not wrong_size:
                    problems.append(f"{shard.name} is damaged: its SHA-256 is not the one in the manifest")
                if shards is not None:
                    problems += [f"{shard.name}: {damage}" for damage in _damage_inside(shards, number)]
        advance(shard.samples)
    return problems


def undecodable_images(shards: ShardFolder) -> list[str]:
    """Decode every image of an intact data set in the set's mode; return one line for each that cannot be decoded."""
    found: list[str] = []
    with ThreadPoolExecutor(pool_threads()) as pool:
        for number, shard in enumerate(shards.manifest.shards):
            samples = np.flatnonzero(shards.index["shard"] == number)
            entries = shards.index[samples]
            with shards.shard_path(number).open("rb") as file:
                manifest = shards.manifest
                read = partial(_decoding_problem, file.fileno(), manifest.image_mode, manifest.orientation_when_read)
                problems = pool.map(read, entries["block"].tolist(), entries["size"].tolist())
                for sample, problem in zip(samples.tolist(), problems, strict=True):
                    if problem:
                        found.append(printable(f"{shard.name}: sample {shards.key(sample)}: {problem}"))
    return found


def _decoding_problem(file: int, image_mode: str, orientation: Orientation, block: int, size: int) -> str | None:
    try:
        decode(os.pread(file, size, block * BLOCK), image_mode, orientation)
    except ValueError as error:
        return str(error)
    return None


def _damage_inside(shards: ShardFolder, shard: int) -> list[str]:
    """Find the samples of a damaged shard that are affected; if there are none, where the damage is."""
    path, damage = shards.shard_path(shard), []
    with path.open("rb") as file:
        for number, entry in enumerate(shards.index[shards.index["shard"] == shard]):
            place = int(entry["block"]) * BLOCK
            data = os.pread(file.fileno(), int(entry["size"]), place)
            if zlib.crc32(data) != entry["crc32"] or len(data) != entry["size"]:
                name = os.pread(file.fileno(), 100, place - BLOCK).partition(b"\0")[0].decode(errors="replace")
                sample = f"sample {split_name(name)[0] or '?'} (number {number} of the shard, byte {place})"
                damage.append(printable(f"the image of {sample} is damaged"))
    manifest = shards.manifest
    label_field = parse_label_field(str(manifest.made.get("label_field", NUMBERS_IN_CLS)))
    samples = {shards.key(int(number)): int(number) for number in np.flatnonzero(shards.index["shard"] == shard)}
    by_name = manifest.made.get("labels") == NAMES
    try:
        for member in read_members(path):
            key = label_field.key(member.name)
            if key is not None and key in samples:
                with path.open("rb") as file:
                    content = os.pread(file.fileno(), member.size, member.offset)
                labels = [
                    (manifest.classes[label] if by_name else str(manifest.first_label + label), share)
                    for label, share in shards.labels_of(samples[key])
                ]
                if not label_field.holds(content, labels):
                    damage.append(f"the label of sample {printable(key)} (byte {member.offset}) is damaged")
    except InputError as error:
        damage.append(f"its structure is damaged: {error}")
    return damage or ["no image or label is affected: the damage is in a header or the padding"]
