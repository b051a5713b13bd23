"""Sample ids to pixels, directly from the shards: index, pread, check, decode. Any thread can read any batch.

Batches read through a Reader: the one here, or the one in resident.py. Both return the same bytes for the same ids.
"""

import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.configs.schema import OnBadImage
from shardstep.configs.text import printable
from shardstep.datasets.decode import decode
from shardstep.datasets.decode_crop import PARTIAL, decode_crop, missing_for_partial
from shardstep.datasets.framing import DRAWS, Framing
from shardstep.datasets.manifest import ShardFolder
from shardstep.datasets.order import WINDOW_ALL_BYTES
from shardstep.datasets.rng import Draws
from shardstep.datasets.tar import BLOCK

_MOST_OPEN_SHARDS = 256  # a data set may have more shards than a process may have open files
# Twice a block of the window `auto`, whose shards may differ in size. More would push itself out of the page cache.
_MOST_READ_AHEAD = 2 * WINDOW_ALL_BYTES
_ADVISE_BYTES = 128 << 10  # Linux reads at most the device's read-ahead, by default 128 KiB, per call of posix_fadvise


class Reader(Protocol):
    """Random access to the images of a data set."""

    image_shape: tuple[int, int, int]
    """(height, width, channels) of every image."""
    takes_draws: bool
    """Whether something is random in reading."""
    bad: set[int]
    """Ids of images that were found to be undecodable, where these are skipped: their pixels are black."""

    def read(self, sample_ids: np.ndarray, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Return pixels, uint8 (batch, height, width, channels), and labels, int64 (batch,), or shares of labels, float32
        (batch, classes), where samples have several.

        `draws` are for what is random in reading; without them, images are read as they are evaluated.
        """
        ...

    def will_need(self, shards: list[int]) -> None:
        """Announce that these shards are about to be read."""
        ...


class _OpenFile:
    """A file descriptor that stays open as long as any thread refers to it."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def read_ahead(self) -> None:
        for start in range(0, os.fstat(self._descriptor).st_size, _ADVISE_BYTES):
            os.posix_fadvise(self._descriptor, start, _ADVISE_BYTES, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class StreamReader:
    """A reader of images from shards; checks each against the size and crc32 in the index."""

    def __init__(
        self,
        shards: ShardFolder,
        framing: Framing | None = None,
        image_mode: str | None = None,
        on_bad_image: OnBadImage = "stop",
    ):
        """Open a reader.

        Args:
            framing: how images are cut and scaled; None keeps their size.
            image_mode: "RGB" or "L"; None means the set's own. A test set is read in its training set's mode.
            on_bad_image: see data.on_bad_image; what is skipped is in `bad`.

        Raises:
            InputError: the images differ in size and there is no framing, or this machine lacks what its version needs.
        """
        lacks = missing_for_partial() if framing and framing.version == PARTIAL else None
        if lacks:
            raise InputError(
                f"data.crop_version={PARTIAL} needs {lacks}. Without it, give data.crop_version=2, and for a run that was "
                f"begun with {PARTIAL} run.allow_changes=[data.crop_version]"
            )
        self._shards, self._framing = shards, framing
        self._open = lru_cache(maxsize=_MOST_OPEN_SHARDS)(lambda shard: _OpenFile(shards.shard_path(shard)))
        self._mode = image_mode or shards.manifest.image_mode
        self._orientation = shards.manifest.orientation_when_read
        shape = shards.manifest.shape_when_read(framing, self._mode)
        if shape is None:
            raise InputError(
                f"the images in {shards.path} differ in size: set data.resize, such as data.resize=224, or "
                f"begin data.augment with random_resized_crop"
            )
        self.image_shape = shape
        self._skips_bad, self.bad = on_bad_image == "skip", set[int]()
        self.takes_draws = framing is not None and framing.random is not None

    def read(self, sample_ids: np.ndarray, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Return pixels and labels, see Reader, in the order of the ids.

        `draws` choose a random part of each image, if the framing has that; without them, its centre is read.

        Raises:
            InputError: a sample is damaged, or its image does not have the size in the manifest.
        """
        pixels = np.empty((len(sample_ids), *self.image_shape), dtype=np.uint8)
        drawn = draws.uniform(DRAWS).tolist() if draws and self._framing and self._framing.random else None
        rows = np.argsort(sample_ids)  # in their order on disk
        for row, sample_id in zip(rows.tolist(), sample_ids[rows].tolist(), strict=True):
            place = pixels[row]
            found = self._decode(sample_id, drawn[row] if drawn else None, place)
            if found is not place:
                place[...] = found
        return torch.from_numpy(pixels), torch.from_numpy(self._shards.targets(sample_ids))

    def read_bytes(self, sample_id: int) -> bytes:
        """Return the image file of a sample.

        Raises:
            InputError: its bytes are not those that were written.
        """
        shard, block, size, _, crc32 = self._shards.index[sample_id].item()
        data = self._open(shard).read(size, block * BLOCK)
        if len(data) != size or zlib.crc32(data) != crc32:
            folder = self._shards.path_of(sample_id).parent
            raise InputError(
                f"{self._name(sample_id)} is damaged: {size} bytes with crc32 {crc32:08x} were written, {len(data)} with "
                f"{zlib.crc32(data):08x} were read. `shardstep shards verify {folder}` finds all damage"
            )
        return data

    def will_need(self, shards: list[int]) -> None:
        """Ask the kernel to read these shards ahead; otherwise a cold disk serves one small read at a time."""
        if sum(self._shards.manifest.shards[shard].bytes for shard in shards) > _MOST_READ_AHEAD:
            return
        for shard in shards:
            self._open(shard).read_ahead()

    def _decode(self, sample_id: int, draws: list[float] | None, out: np.ndarray) -> np.ndarray:
        data = self.read_bytes(sample_id)
        try:
            if self._framing:
                return decode_crop(data, self._mode, self._framing, draws, out, self._orientation)
            pixels = decode(data, self._mode, self._orientation)
        except ValueError as error:
            if not self._skips_bad:
                raise InputError(
                    f"{self._name(sample_id)}: {error}. `shardstep shards verify {self._shards.path_of(sample_id).parent}` "
                    f"lists all such images, and a run with data.on_bad_image=skip leaves them out"
                ) from None
            self.bad.add(sample_id)
            out[...] = 0
            return out
        if pixels.shape != self.image_shape:
            raise InputError(
                f"{self._name(sample_id)} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the manifest says "
                f"{self.image_shape[1]}x{self.image_shape[0]}. Set data.resize to make them equal"
            )
        return pixels

    def _name(self, sample_id: int) -> str:
        return f"{self._shards.path_of(sample_id)}: sample {printable(self._shards.key(sample_id))}"
