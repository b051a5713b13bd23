"""How well the labels of samples with several of them are found: average precision, and F1 at a threshold."""

from dataclasses import dataclass

import torch
from torch import Tensor

HOLDS = 0.5  # a label holds for a sample if its share is larger
_SORTED_TOGETHER = 1 << 24  # values


@dataclass(frozen=True)
class LabelScores:
    """Scores over a test set. Means over classes leave out those that no sample has.

    Attributes:
        average_precision: of each class; None for one that no sample has.
        f1: of each class at the threshold; None for one that no sample has.
        f1_micro: over all decisions on all classes together.
    """

    average_precision: list[float | None]
    f1: list[float | None]
    f1_micro: float

    @property
    def mean_average_precision(self) -> float:
        """The mean over the classes; 0 if no sample has any label."""
        return _mean(self.average_precision)

    @property
    def f1_macro(self) -> float:
        """The mean over the classes; 0 if no sample has any label."""
        return _mean(self.f1)


def score_labels(outputs: Tensor, shares: Tensor, threshold: float) -> LabelScores:
    """Score the outputs of a model.

    Args:
        outputs: float32 (N, K), logits of independent probabilities.
        shares: float32 (N, K), of the labels.
        threshold: probability from which a label counts as found.
    """
    holds = shares > HOLDS
    samples_with = holds.sum(dim=0).tolist()
    precisions = average_precision(outputs, holds).tolist()
    found = outputs.double().sigmoid() >= threshold
    hits, decisions = (found & holds).sum(dim=0).tolist(), found.sum(dim=0).tolist()
    return LabelScores(
        [precision if count else None for precision, count in zip(precisions, samples_with, strict=True)],
        [_f1(hit, of, count) if count else None for hit, of, count in zip(hits, decisions, samples_with, strict=True)],
        _f1(sum(hits), sum(decisions), sum(samples_with)),
    )


def average_precision(scores: Tensor, holds: Tensor) -> Tensor:
    """Compute the average precision of each column, float64 (K,): the sum over thresholds of (R_n - R_n-1) P_n.

    Samples of equal score share a threshold, so that their order does not matter. A column that holds for none is NaN.

    Args:
        scores: (N, K); a higher one means more likely.
        holds: bool (N, K).
    """
    together = max(1, _SORTED_TOGETHER // max(1, len(scores)))
    return torch.cat([
        _average_precision(*parts)
        for parts in zip(scores.split(together, dim=1), holds.split(together, dim=1), strict=True)
    ])  # fmt: skip


def _average_precision(scores: Tensor, holds: Tensor) -> Tensor:
    ordered, order = scores.sort(dim=0, descending=True, stable=True)
    hits = holds.gather(0, order).double().cumsum(dim=0)
    precision = hits / torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64).unsqueeze(1)
    is_threshold = torch.ones_like(holds)
    is_threshold[:-1] = ordered[:-1] != ordered[1:]
    # The hits up to the threshold before: the running maximum of those at thresholds, one row later.
    before = torch.where(is_threshold, hits, 0.0).cummax(dim=0).values.roll(1, dims=0)
    before[:1] = 0.0
    gained = torch.where(is_threshold, (hits - before) * precision, 0.0)
    return gained.sum(dim=0) / hits[-1:].squeeze(0)


def _f1(hits: float, decisions: float, samples: float) -> float:
    return 2 * hits / (decisions + samples) if decisions + samples else 0.0


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
