"""Evaluate a model on a test set: exact metrics, each sample counted once, for any number of ranks."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.schema import EvalConfig, OnBadImage
from shardstep.trainer.distributed.buffers import flatten_buffers, set_buffers
from shardstep.trainer.distributed.collectives import gather_samples, mean_over_ranks, reduce_sums
from shardstep.trainer.models.views import predict
from shardstep.trainer.optim.label_scores import LabelScores, score_labels
from shardstep.trainer.optim.losses import Objective, one_label

MOST_CLASSES_IN_CONFUSION = 1000
"""More classes have no confusion matrix: its size is the square of their number."""
TestBatches = Callable[[], Iterable[tuple[Tensor, Tensor, np.ndarray]]]
"""Starts a new pass over this rank's part of the test set: images, labels, sample ids."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics over a test set.

    Attributes:
        loss: mean, not smoothed.
        samples: number of samples that were counted.
        bad_images: number of those that were left out, because their images cannot be decoded.
        first_bad_images: shard and key of the first of them; for the caller to fill in.
        accuracy: share of samples whose highest output is their label; None where images are reconstructed, or have several
            labels, like the two below.
        top5: share of samples whose label is among the five highest outputs.
        class_samples: int64 (classes,), samples of each label.
        class_correct: int64 (classes,), those whose highest output is their label.
        confusion: int64 (classes, classes); row: label, column: prediction; None for very many classes.
        labels: how well the labels are found where samples have several.
    """

    loss: float
    samples: int
    accuracy: float | None = None
    top5: float | None = None
    class_samples: Tensor | None = None
    class_correct: Tensor | None = None
    confusion: Tensor | None = None
    labels: LabelScores | None = None
    bad_images: int = 0
    first_bad_images: list[dict[str, str]] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float | None]:
        """The metrics that are one number, by their names in metrics.jsonl and summary.json."""
        found = {"loss": self.loss, "accuracy": self.accuracy, "top5": self.top5}
        if self.labels is None:
            return found
        labels = self.labels
        return found | {"map": labels.mean_average_precision, "f1": labels.f1_macro, "f1_micro": labels.f1_micro}

    @property
    def best_by(self) -> float:
        """What the best evaluation has most of: accuracy, mean average precision, or else the least loss."""
        if self.labels is not None:
            return self.labels.mean_average_precision
        return -self.loss if self.accuracy is None else self.accuracy

    @property
    def per_class_accuracy(self) -> list[float | None] | None:
        """The accuracy of each class; None for a class without samples."""
        if self.class_samples is None or self.class_correct is None:
            return None
        pairs = zip(self.class_correct.tolist(), self.class_samples.tolist(), strict=True)
        return [correct / samples if samples else None for correct, samples in pairs]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards each of its layers into the mode that it had."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, was_training in modes:
            layer.training = was_training


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    module: nn.Module,
    batches: TestBatches,
    objective: Objective,
    num_samples: int,
    num_classes: int,
    config: EvalConfig,
    stop_requested: Callable[[], bool] = lambda: False,
    on_bad_image: OnBadImage = "stop",
) -> Evaluation | None:
    """Evaluate a model on all ranks together.

    Args:
        module: the model without DDP's wrapper, which would broadcast buffers in its forward pass.
        num_samples: size of the test set, for a check that each sample was counted.
        stop_requested: called after each batch, equally often on every rank; returns the same on all.
        on_bad_image: whether batches may lack samples, see data.on_bad_image.

    Returns:
        The same metrics on every rank; None if a stop was requested.

    Raises:
        InputError: no image can be decoded.
    """
    own_buffers = flatten_buffers(module)
    set_buffers(module, mean_over_ranks(accelerator, own_buffers))
    with evaluating(module):
        counted = _count(module, batches, objective, num_classes, config, accelerator.device, stop_requested)
    if counted is None:
        set_buffers(module, own_buffers)  # the next start evaluates again from there
        return None

    sums, class_counts = reduce_sums(accelerator, [counted.sums, counted.class_counts])
    total_loss, correct, top5, count = sums.tolist()
    bad_images = _left_out(int(count), num_samples, on_bad_image)
    if objective.finds_several:
        outputs, shares = (gather_samples(accelerator, values) for values in (counted.outputs, counted.shares))
        scores = score_labels(outputs, shares, config.threshold)
        return Evaluation(total_loss / count, int(count), labels=scores, bad_images=bad_images)
    if objective.reconstructs:
        return Evaluation(total_loss / count, int(count), bad_images=bad_images)
    class_counts = class_counts.view(num_classes, -1).long().cpu()
    has_confusion = num_classes <= MOST_CLASSES_IN_CONFUSION
    return Evaluation(
        loss=total_loss / count,
        samples=int(count),
        accuracy=correct / count,
        top5=top5 / count,
        class_samples=class_counts.sum(dim=1),
        class_correct=class_counts.diagonal() if has_confusion else class_counts[:, 1],
        confusion=class_counts if has_confusion else None,
        bad_images=bad_images,
    )


def _left_out(count: int, num_samples: int, on_bad_image: OnBadImage) -> int:
    """Return how many samples were not counted, which must be those whose images cannot be decoded."""
    assert count == num_samples or on_bad_image == "skip", f"{count} of {num_samples} test samples were counted"
    if not count:
        raise InputError(f"none of the {num_samples:,} images to evaluate on can be decoded")
    return num_samples - count


@dataclass(frozen=True)
class _Counted:
    """What one rank has found.

    Attributes:
        sums: loss, correct, in the top five, samples.
        class_counts: the confusion matrix, flat; for very many classes, of (classes, 2): wrong and correct.
        outputs, shares: float32 (samples, classes), of all samples where they have several labels.
    """

    sums: Tensor
    class_counts: Tensor
    outputs: Tensor
    shares: Tensor


def _count(
    module: nn.Module,
    batches: TestBatches,
    objective: Objective,
    num_classes: int,
    config: EvalConfig,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> _Counted | None:
    """Evaluate this rank's samples; return None if it is to stop."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    columns = num_classes if num_classes <= MOST_CLASSES_IN_CONFUSION else 2
    counts = num_classes * columns if objective.classifies else 0
    class_counts = torch.zeros(counts, dtype=torch.float64, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    kept = [(torch.zeros(0, num_classes, device=device),) * 2]
    for images, labels, _ in batches():
        if stop_requested():
            return None
        if len(labels) == 0:
            continue
        outputs = predict(module, images, config.views, config.sure_above)  # (B, K)
        sums[3] += len(labels)
        sums[0] += objective.evaluation_loss(outputs, images if objective.reconstructs else labels).sum().double()
        if objective.finds_several:
            kept.append((outputs, labels))
        if not objective.classifies:
            continue
        # Nothing below waits for the device, as bincount or a tensor made from a Python number would.
        labels = one_label(labels)
        best = outputs.topk(min(5, num_classes), dim=1).indices
        hits = best == labels.unsqueeze(1)
        sums[1:3] += torch.stack([hits[:, 0].sum(), hits.sum()])
        column = best[:, 0] if columns == num_classes else hits[:, 0].long()
        class_counts.scatter_add_(0, labels * columns + column, one.expand(len(labels)))
    outputs, shares = (torch.cat(values) for values in zip(*kept, strict=True))
    return _Counted(sums, class_counts, outputs, shares)
