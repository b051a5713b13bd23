"""A model and a test set to exact figures: every sample counted once, whatever the number of ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shardstep.configs.schema import EvalConfig
from shardstep.trainer.distributed.buffers import flatten_buffers, set_buffers
from shardstep.trainer.distributed.collectives import mean_over_ranks, reduce_sums
from shardstep.trainer.models.views import predict
from shardstep.trainer.optim.losses import Objective

TestBatches = Callable[[], Iterable[tuple[Tensor, Tensor, np.ndarray]]]
"""Makes a fresh pass over this rank's part of the test set: images, labels, sample ids."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over a whole test set.

    Attributes:
        loss: mean, not smoothed.
        samples: how many were counted.
        accuracy: share of samples whose highest output is their label; None for reconstruction, like all that follows.
        top5: share of samples whose label is among the five highest outputs.
        confusion: int64 (classes, classes); row: label, column: prediction.
    """

    loss: float
    samples: int
    accuracy: float | None = None
    top5: float | None = None
    confusion: Tensor | None = None

    @property
    def per_class_accuracy(self) -> list[float | None] | None:
        """Accuracy of each class; None for a class without samples."""
        if self.confusion is None:
            return None
        return [
            int(self.confusion[label, label]) / total if total else None
            for label, total in enumerate(self.confusion.sum(dim=1).tolist())
        ]


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
) -> Evaluation | None:
    """Evaluate a model on all ranks together.

    Args:
        accelerator: the world.
        module: the model without DDP's wrapper, whose forward pass would broadcast buffers.
        batches: this rank's part of the test set.
        objective: what to count.
        num_samples: size of the test set, to be counted exactly.
        num_classes: outputs of the model.
        config: which views of an image to look at.
        stop_requested: asked after each batch, on every rank equally often; all get the same answer.

    Returns:
        The same figures on every rank; None if a stop was requested.
    """
    own_buffers = flatten_buffers(module)
    set_buffers(module, mean_over_ranks(accelerator, own_buffers))
    was_training = module.training
    module.eval()
    device = accelerator.device
    # sums: loss, correct, among the top five, samples
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.float64, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    for images, labels, _ in batches():
        if stop_requested():
            module.train(was_training)
            set_buffers(module, own_buffers)  # the same evaluation begins from there
            return None
        if len(labels) == 0:
            continue
        outputs = predict(module, images, config.views, config.sure_above)  # (B, K)
        sums[3] += len(labels)
        if objective.reconstructs:
            sums[0] += objective.evaluation_loss(outputs, images)
            continue
        # Nothing below waits for the device: bincount would, and a tensor that is made of a number, too.
        best = outputs.topk(min(5, num_classes), dim=1).indices
        hits = best == labels.unsqueeze(1)
        sums[:3] += torch.stack(
            [objective.evaluation_loss(outputs, labels).double(), hits[:, 0].sum(), hits.sum()],
        )
        confusion.scatter_add_(0, labels * num_classes + best[:, 0], one.expand(len(labels)))
    module.train(was_training)

    sums, confusion = reduce_sums(accelerator, [sums, confusion])
    total_loss, correct, top5, count = sums.tolist()
    assert count == num_samples, f"{count:.0f} of {num_samples} test samples were counted"
    if objective.reconstructs:
        return Evaluation(total_loss / count, int(count))
    return Evaluation(
        loss=total_loss / count,
        samples=int(count),
        accuracy=correct / count,
        top5=top5 / count,
        confusion=confusion.view(num_classes, num_classes).long().cpu(),
    )
