"""Generated images as a Source: as many as wanted, the same everywhere, and learnable."""

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.datasets.rng import philox_words
from shardstep.datasets.sources.source import SPLITS, Source

_MOST_SYNTHETIC = 10_000_000


def make_synthetic(source: str, split: str) -> Source:
    """Return the source `synthetic:N`: N RGB images of 32x32 pixels in 10 classes; an image depends on split and number.

    Raises:
        InputError: N is missing, 0 or too large.
    """
    count_text = source.removeprefix("synthetic:")
    if not count_text.isdecimal() or int(count_text) == 0:
        raise InputError(f"{source!r}: write synthetic:N with a number of images, such as synthetic:1000")
    count, size, num_classes = int(count_text), 32, 10
    if count > _MOST_SYNTHETIC:
        raise InputError(f"{source!r}: at most {_MOST_SYNTHETIC:,} images can be made")
    key = (20260101, SPLITS.index(split) if split in SPLITS else len(SPLITS))
    labels = (philox_words(count, key, (1, 0, 0)) % np.uint64(num_classes)).astype(np.int64)

    # Each class is a smooth coloured pattern: a 4x4 grid of random colours, enlarged. Images are noisy copies.
    grid = (philox_words(num_classes * 48, (20260101, 0), (0, 0, 0)) >> np.uint64(56)).astype(np.float64)
    patterns = grid.reshape(num_classes, 4, 4, 3).repeat(size // 4, axis=1).repeat(size // 4, axis=2)

    def read(number: int) -> np.ndarray:
        words = philox_words(size * size * 3 // 8, key, (2, number, 0))
        noise = words.view(np.uint8).reshape(size, size, 3)  # 0..255
        return (patterns[labels[number]] * 0.5 + noise * 0.5).astype(np.uint8)

    classes = [f"class{label}" for label in range(num_classes)]
    return Source(source, classes, labels, read, lambda number: f"image {number}")
