"""Losses by name: (outputs, labels) -> the sum over the batch. Keyword arguments are the recipe's options.

Sums, not means: the trainer divides by the number of samples in the global batch, so that shares of any size, empty
ones too, add up to the exact global mean.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardstep.configs.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (B, K) with labels (B,), summed.

    With smoothing s, the target is 1 - s on the label plus s / K on every class (Szegedy et al. 2015, arXiv 1512.00567,
    section 7).
    """
    return functional.cross_entropy(outputs.float(), labels, reduction="sum", label_smoothing=label_smoothing)


def nll(outputs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of log-probabilities (B, K) at labels (B,), summed; needs output_activation=log_softmax."""
    return functional.nll_loss(outputs.float(), labels, reduction="sum")


LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": cross_entropy, "nll": nll}


def training_loss(section: dict[str, Any]) -> Loss:
    """The loss that a checked recipe section names, with its options."""
    return partial(LOSSES[section["name"]], **{key: section[key] for key in section if key != "name"})


def evaluation_loss(section: dict[str, Any]) -> Loss:
    """The same loss without what only serves training, such as label smoothing."""
    return LOSSES[section["name"]]


def check_outputs(section: dict[str, Any], outputs: Tensor) -> None:
    """Check that a model's outputs are what the loss takes.

    Raises:
        InputError: the loss is nll, and the outputs are not log-probabilities: it would fall without bound.
    """
    total = outputs.double().exp().sum(dim=1)
    if section["name"] == "nll" and not torch.allclose(total, torch.ones_like(total), atol=1e-2):
        raise InputError(
            "loss.name=nll takes log-probabilities: give model.output_activation=log_softmax, or "
            "loss.name=cross_entropy, which takes logits"
        )
