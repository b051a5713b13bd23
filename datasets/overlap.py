"""Images that are in two data sets: a sample of one is looked for in the other, by label, size and crc32, then by its bytes.

The crc32 alone does not tell PNG files of one size apart. Each part of such a file ends with its own crc32, in the other
order of bytes than a crc32 would cancel out in: what is left are 65,536 values.
"""

import os
from itertools import groupby

import numpy as np

from shardstep.datasets.manifest import ShardFolder
from shardstep.datasets.parts import Part
from shardstep.datasets.tar import BLOCK

_MOST_LOOKED_FOR = 1000  # images of a set
_MOST_READ = 4000  # images that look the same by label, size and crc32


def count_shared(part: Part, other: Part) -> tuple[int, int]:
    """Look for images of a part in another one; return how many are there, and how many were looked for."""
    wanted = part.ids_of(np.unique(np.linspace(0, part.samples - 1, _MOST_LOOKED_FOR).astype(np.int64)))
    keys, inverse = np.unique(_keys(part, wanted), return_inverse=True)
    others = _keys(other, other.ids)
    places = np.minimum(np.searchsorted(keys, others), len(keys) - 1)
    numbers = np.flatnonzero(keys[places] == others)
    numbers = numbers[np.argsort(places[numbers], kind="stable")]
    alike = {int(place): other.ids_of(np.array(list(some))) for place, some in groupby(numbers, places.__getitem__)}
    found, read = 0, 0
    for looked_for, (sample, place) in enumerate(zip(wanted.tolist(), inverse.tolist(), strict=True), 1):
        candidates = alike.get(place, np.empty(0, dtype=np.int64)).tolist()
        content = _bytes(part.shards, sample) if candidates else b""
        found += any(_bytes(other.shards, candidate) == content for candidate in candidates)
        read += len(candidates)
        if read > _MOST_READ:
            return found, looked_for
    return found, len(wanted)


def _keys(part: Part, ids: np.ndarray | None) -> np.ndarray:
    """Return a number for label, size and crc32 of some images, the same for the same; uint64 (samples,).

    The label only where each image has one.
    """
    entries = part.shards.index if ids is None else part.shards.index[ids]
    label, size, crc32 = (entries[name].astype(np.uint64) for name in ("label", "size", "crc32"))
    if part.manifest.has_several_labels:
        label[:] = 0
    return (size << np.uint64(32) | crc32) ^ label * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64


def _bytes(shards: ShardFolder, sample: int) -> bytes:
    entry = shards.index[sample]
    with shards.shard_path(int(entry["shard"])).open("rb") as file:
        return os.pread(file.fileno(), int(entry["size"]), int(entry["block"]) * BLOCK)
