"""The 8x8 digits inside scikit-learn as a Source."""

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.datasets.sources.source import Source, is_fifth_of_class

DIGITS, DIGIT_CLASSES = "digits of scikit-learn", [str(label) for label in range(10)]


def read_digits(split: str) -> Source:
    """Return one split: every fifth sample of each class is a test sample, so both splits hold all classes.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the source digits needs scikit-learn: pip install shardstep[digits]") from None
    digits = load_digits()
    chosen = np.flatnonzero(is_fifth_of_class(digits.target) == (split == "test"))
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 17 grey levels, (N, 8, 8)
    return Source(
        DIGITS,
        list(DIGIT_CLASSES),
        digits.target[chosen].astype(np.int64),
        lambda number: images[number, :, :, np.newaxis],
        lambda number: f"image {number}",
    )
