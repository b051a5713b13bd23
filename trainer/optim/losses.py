"""Losses by name: (outputs, targets) -> one loss per sample, (B,). Keyword arguments are the recipe's options.

Objective adds them up; the loop divides the sum by the number of samples in the global batch, so that shares of any size,
even empty ones, add up to the exact global mean. With `reduction: sum` it does not divide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from shardstep.configs.errors import InputError
from shardstep.datasets.augment import Labels

Outputs = Tensor | tuple[Tensor, ...]
"""What a model returns: its outputs; in training perhaps a tuple with the outputs of auxiliary heads."""


def cross_entropy(outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (B, K) with labels (B,), per sample.

    With smoothing s, the target is 1 - s on the label plus s / K on every class (Szegedy et al. 2015, arXiv 1512.00567,
    section 7).
    """
    return functional.cross_entropy(outputs.float(), labels, reduction="none", label_smoothing=label_smoothing)


def nll(outputs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of log-probabilities (B, K) at labels (B,), per sample; needs output_activation=log_softmax."""
    return functional.nll_loss(outputs.float(), labels, reduction="none")


def perceptron(outputs: Tensor, labels: Tensor) -> Tensor:
    """Margin by which the highest wrong output of (B, K) exceeds the label's, or 0, per sample.

    For two classes with y = -1 or 1 and f = outputs[1] - outputs[0] this is Rosenblatt's max(0, -y f) (1958, Psychological
    Review 65); for more classes it is the extension by Crammer and Singer 2001, JMLR 2, without a margin. A tie counts as an
    error: the gradient follows the rule "if y f <= 0".
    """
    scores = outputs.float()
    own = scores.gather(1, labels.unsqueeze(1)).squeeze(1)  # (B,)
    others = scores.scatter(1, labels.unsqueeze(1), -torch.inf)
    deficit = others.amax(dim=1) - own
    return torch.where(deficit < 0, 0.0, deficit)  # unlike a clamp, this passes a NaN on


def mse(outputs: Tensor, images: Tensor) -> Tensor:
    """Squared error of reconstructed images (B, C, H, W): the mean over the values of each image."""
    return (outputs.float() - images).square().mean(dim=(1, 2, 3))


def l1(outputs: Tensor, images: Tensor) -> Tensor:
    """Absolute error of reconstructed images (B, C, H, W): the mean over the values of each image."""
    return (outputs.float() - images).abs().mean(dim=(1, 2, 3))


CLASSIFICATION: dict[str, Callable[..., Tensor]] = {loss.__name__: loss for loss in (cross_entropy, nll, perceptron)}
RECONSTRUCTION: dict[str, Callable[..., Tensor]] = {"mse": mse, "l1": l1}
LOSSES = CLASSIFICATION | RECONSTRUCTION

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {"reduction": (Literal["mean", "sum"], "mean")}
"""Options of every loss: type and default. reduction: over the global batch, for the gradient; metrics are always means."""


@dataclass(frozen=True)
class Objective:
    """The losses for training and evaluation.

    Attributes:
        training_loss: outputs and targets in, one loss per sample out.
        evaluation_loss: the same without options that only serve training, such as label smoothing.
        reconstructs: whether the images are the targets, so that no output is correct or wrong.
    """

    training_loss: Callable[[Tensor, Tensor], Tensor]
    evaluation_loss: Callable[[Tensor, Tensor], Tensor]
    reconstructs: bool
    auxiliary_weight: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"

    def divisor(self, batch_size: int) -> int:
        """Return what to divide the sum over a global batch by."""
        return 1 if self.reduction == "sum" else batch_size

    def loss(self, outputs: Outputs, images: Tensor, labels: Labels) -> Tensor:
        """Return the training loss of a batch, summed, including auxiliary heads."""
        main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        targets = images if self.reconstructs else labels
        total = self._sum(main, targets)
        for head in auxiliary:
            total = total + self.auxiliary_weight * self._sum(head, targets)
        return total

    def correct(self, outputs: Outputs, labels: Labels) -> Tensor | int:
        """Count the samples of a batch whose highest output is their label, or the one with the larger weight of two."""
        if self.reconstructs:
            return 0
        main = outputs[0] if isinstance(outputs, tuple) else outputs
        return (main.argmax(dim=1) == (labels if isinstance(labels, Tensor) else labels.heavier)).sum()

    def _sum(self, outputs: Tensor, targets: Labels) -> Tensor:
        if isinstance(targets, Tensor):
            return self.training_loss(outputs, targets).sum()
        own, partners = (self.training_loss(outputs, each) for each in (targets.own, targets.partners))
        return torch.lerp(partners, own, targets.weights).sum()


def build_objective(loss: dict[str, Any], model: dict[str, Any]) -> Objective:
    """Build the objective of checked recipe sections; a model may have the option `auxiliary_weight`."""
    function = LOSSES[loss["name"]]
    return Objective(
        training_loss=partial(function, **{key: loss[key] for key in loss if key not in ("name", *COMMON_OPTIONS)}),
        evaluation_loss=function,
        reconstructs=loss["name"] in RECONSTRUCTION,
        auxiliary_weight=model.get("auxiliary_weight", 0.0),
        reduction=loss["reduction"],
    )


def check_outputs(loss: dict[str, Any], outputs: Tensor, images: Tensor) -> None:
    """Check that a model's outputs fit the loss.

    Raises:
        InputError: the loss compares images and the model classifies, or vice versa; or the loss is nll and the outputs are
            not log-probabilities, so that the loss would fall without bound.
    """
    name = loss["name"]
    if name in RECONSTRUCTION and outputs.shape != images.shape:
        raise InputError(
            f"loss.name={name} compares images with images, but the model's outputs have shape "
            f"{tuple(outputs.shape[1:])}: use a model that reconstructs (autoencoder), or one of {', '.join(CLASSIFICATION)}"
        )
    if name in CLASSIFICATION and outputs.ndim != 2:
        raise InputError(
            f"loss.name={name} needs one number per class, but the model's outputs are images: use one of "
            f"{', '.join(RECONSTRUCTION)}, or another model"
        )
    if name == "nll":
        total = outputs.double().exp().sum(dim=1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
            raise InputError(
                "loss.name=nll takes log-probabilities: use loss.name=cross_entropy, which takes logits, or a model with "
                "output_activation=log_softmax"
            )
