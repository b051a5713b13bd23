"""Calibration: how far a model's confidence can be trusted, from confidences and correctness. Pure."""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Bin:
    """The samples with a confidence in (lower, upper]: their number, mean confidence and accuracy."""

    lower: float
    upper: float
    samples: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> list[Bin]:
    """Bin samples by confidence, in bins of equal width; leave out those without samples.

    Args:
        confidence: (N,), probability of the predicted class.
        correct: bool (N,), whether that class is the label.
    """
    place = np.clip(np.ceil(confidence.astype(np.float64) * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return [
        Bin(
            lower=number / num_bins,
            upper=(number + 1) / num_bins,
            samples=int(chosen.sum()),
            confidence=float(confidence[chosen].mean(dtype=np.float64)),
            accuracy=float(correct[chosen].mean()),
        )
        for number in range(num_bins)
        if (chosen := place == number).any()
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Return the mean distance of accuracy and confidence over the samples. Guo et al. 2017, arXiv 1706.04599, eq. 3."""
    total = sum(part.samples for part in bins)
    return sum(part.samples * abs(part.accuracy - part.confidence) for part in bins) / total
