"""A data set decoded once: one array of pixels per node, which ranks memory-map or copy to their device.

The array is a file in the cache folder, named after the data set's fingerprint, the image size, and the versions of the
decoder and of the crop.
"""

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardstep.configs.cores import pool_threads
from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import file_lock
from shardstep.configs.schema import OnBadImage
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.decode import DECODER
from shardstep.datasets.framing import Framing
from shardstep.datasets.manifest import Manifest, ShardFolder
from shardstep.datasets.progress import progress_bar
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.rng import Draws

_DECODE_TOGETHER = 500  # images per task of the pool


class ResidentReader:
    """A reader of images from an array in memory, on any device."""

    def __init__(self, pixels: Tensor, labels: Tensor, bad: Iterable[int] = ()):
        """`pixels`: uint8 (samples, height, width, channels); `labels`: int64 (samples,), or shares of them,
        float32 (samples, classes); on the same device. `bad`: see Reader."""
        self.bad = set(bad)
        self._pixels, self._labels = pixels, labels
        height, width, channels = pixels.shape[1:]
        self.image_shape, self.takes_draws = (height, width, channels), False

    def read(self, sample_ids: np.ndarray, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Return pixels and labels, see Reader, in the order of the ids.

        `draws` have no effect: images were cut and scaled when they were decoded.
        """
        ids = torch.from_numpy(sample_ids).to(self._pixels.device, non_blocking=True)
        return self._pixels.index_select(0, ids), self._labels.index_select(0, ids)

    def will_need(self, shards: list[int]) -> None:
        """Do nothing: everything is in memory."""


def decoded_bytes(manifest: Manifest, framing: Framing | None, image_mode: str) -> int | None:
    """Return the size of the decoded array, or None if the images differ in size."""
    shape = manifest.shape_when_read(framing, image_mode)
    return None if shape is None else manifest.samples * math.prod(shape)


def decoded_path(manifest: Manifest, image_shape: tuple[int, int, int], framing: Framing | None) -> Path:
    """Return the file of the array that holds a data set's images, decoded to (height, width, channels)."""
    cropped = f"-crop{framing.version}" if framing and framing.version > 1 else ""
    return cache_folder() / f"{manifest.fingerprint}-{'x'.join(map(str, image_shape))}-{DECODER}{cropped}.u8"


def load_resident(
    shards: ShardFolder,
    framing: Framing | None,
    device: torch.device,
    image_mode: str | None = None,
    on_bad_image: OnBadImage = "stop",
) -> ResidentReader:
    """Decode a data set, or map the array of an earlier run, and put it on the device.

    Args:
        shards, framing, image_mode, on_bad_image: as for StreamReader; the framing is not random.

    Raises:
        InputError: a sample is damaged, or the cache folder is not writable.
    """
    stream = StreamReader(shards, framing, image_mode, on_bad_image)
    shape = (shards.manifest.samples, *stream.image_shape)
    path = decoded_path(shards.manifest, stream.image_shape, framing)
    try:
        with file_lock(path.with_suffix(".lock")):
            bad = _bad_in_intact(path, shape)
            if bad is None or (bad and on_bad_image == "stop"):
                try:
                    _decode_all(stream, shape, path, str(shards.path))
                    bad = stream.bad
                finally:
                    path.with_suffix(".partial").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"the decoded images cannot be written to {path.parent} ({error}): point SHARDSTEP_CACHE at a "
            f"folder with {np.prod(shape):,} free bytes, or use data.mode=stream"
        ) from None
    # Copy on write: ranks share the pages, and torch gets writable memory, as it expects.
    pixels = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=shape))
    return ResidentReader(pixels.to(device), torch.from_numpy(shards.targets(np.arange(shape[0]))).to(device), bad)


def _decode_all(stream: StreamReader, shape: tuple[int, ...], path: Path, name: str) -> None:
    partial = path.with_suffix(".partial")  # we hold the lock, so no other process uses a leftover
    with partial.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))  # a full disk raises here, instead of a SIGBUS later
    pixels = np.memmap(partial, dtype=np.uint8, mode="r+", shape=shape)

    def decode(start: int) -> int:
        ids = np.arange(start, min(start + _DECODE_TOGETHER, shape[0]))
        pixels[ids[0] : ids[-1] + 1] = stream.read(ids)[0].numpy()
        return len(ids)

    with (
        progress_bar(f"decoding {name}", shape[0], "images") as advance,
        ThreadPoolExecutor(pool_threads()) as pool,
    ):
        for done in pool.map(decode, range(0, shape[0], _DECODE_TOGETHER)):
            advance(done)
    pixels.flush()
    partial.with_suffix(".sha256").write_text(" ".join([_digest(pixels), *map(str, sorted(stream.bad))]))
    partial.replace(path)


def _bad_in_intact(path: Path, shape: tuple[int, ...]) -> set[int] | None:
    """Return the ids of undecodable images in an array that is complete and unchanged since it was decoded; else None."""
    digest = path.with_suffix(".sha256")
    if not (path.is_file() and digest.is_file() and path.stat().st_size == int(np.prod(shape))):
        return None
    expected, *bad = digest.read_text().split() or [""]
    is_intact = expected == _digest(np.memmap(path, dtype=np.uint8, mode="r", shape=shape))
    return set(map(int, bad)) if is_intact else None


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.data).hexdigest()
