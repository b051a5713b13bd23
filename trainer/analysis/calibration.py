"""Confidences and whether they were right, to how far a model's confidence can be trusted. Pure."""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Bin:
    """The samples whose confidence lies in (lower, upper]: how many, their mean confidence, and the share that is right."""

    lower: float
    upper: float
    samples: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> list[Bin]:
    """Samples by confidence, in bins of equal width; those without samples are left out.

    Args:
        confidence: (N,), probability of the predicted class.
        correct: bool (N,), whether it was the label.
        num_bins: over 0..1.
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
    """Mean distance of accuracy and confidence over the bins, by their samples. Guo et al. 2017, arXiv 1706.04599, eq. 3."""
    total = sum(part.samples for part in bins)
    return sum(part.samples * abs(part.accuracy - part.confidence) for part in bins) / total
