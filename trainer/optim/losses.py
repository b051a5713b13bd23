"""Losses by name: (outputs, targets) -> one loss per sample, (B,). Keyword arguments are the recipe's options.

Where samples have several labels, targets are the shares of all classes, float32 (B, K): 1 for a label that holds. The binary
losses decide on each class by itself. cross_entropy takes shares that sum to 1, as of several annotators.

Objective adds them up; the loop divides the sum by the number of samples in the global batch, so that shares of any size,
even empty ones, add up to the exact global mean. With `reduction: sum` it does not divide.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shardstep.configs.components import neighbours
from shardstep.configs.errors import InputError
from shardstep.configs.imported import call, is_import_path, load_function
from shardstep.datasets.augment import Labels
from shardstep.datasets.label_sets import LabelSets

_ROUNDING = 1e-3  # of shares written with three decimals
Outputs = Tensor | tuple[Tensor, ...]
"""What a model returns: its outputs; in training perhaps a tuple with the outputs of auxiliary heads."""


def cross_entropy(outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (B, K) with labels (B,), or with shares (B, K) that sum to 1, per sample.

    With smoothing s, the target is 1 - s on the label plus s / K on every class (Szegedy et al. 2015, arXiv 1512.00567,
    section 7).
    """
    return functional.cross_entropy(outputs.float(), labels, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(
    outputs: Tensor, labels: Tensor, positive_weights: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Binary cross-entropy of logits (B, K) with shares of classes (B, K), or with labels (B,): the mean over the classes.

    With smoothing s, a share t becomes t (1 - s) + s / K.
    """
    shares = class_shares(labels, outputs.shape[1])
    if label_smoothing:
        shares = shares * (1 - label_smoothing) + label_smoothing / outputs.shape[1]
    return functional.binary_cross_entropy_with_logits(
        outputs.float(), shares, reduction="none", pos_weight=positive_weights
    ).mean(dim=1)


def asymmetric(
    outputs: Tensor, labels: Tensor, positive_weights: Tensor | None = None,
    *, gamma_positive: float = 0.0, gamma_negative: float = 4.0, margin: float = 0.05,
) -> Tensor:  # fmt: skip
    """Asymmetric loss of logits (B, K) with the shares of classes (B, K), or with labels (B,): the sum over the classes.

    Each class is weighted by (1 - p) to the power gamma_positive where it holds, and by p, less the margin, to the power
    gamma_negative where it does not. Ridnik et al. 2020, arXiv 2009.14119, equations 4 to 7.
    """
    outputs, shares = outputs.float(), class_shares(labels, outputs.shape[1])
    probability = outputs.sigmoid()
    shifted = (probability - margin).clamp(min=0)
    positive = (1 - probability) ** gamma_positive * functional.logsigmoid(outputs)
    negative = shifted**gamma_negative * torch.log1p(-shifted.clamp(max=1 - 1e-7))
    if positive_weights is not None:
        positive = positive * positive_weights
    return -(shares * positive + (1 - shares) * negative).sum(dim=1)


def focal(outputs: Tensor, labels: Tensor, positive_weights: Tensor | None = None, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy of logits (B, K), weighted by (1 - p) to the power gamma, where p is the probability of the label.

    With labels (B,), p is the softmax. With shares of classes (B, K), each class is decided by its sigmoid, and the loss is
    the mean over the classes. Lin et al. 2017, arXiv 1708.02002, equation 4; its alpha is loss.class_weights.
    """
    outputs = outputs.float()
    if not labels.is_floating_point():
        logarithm = outputs.log_softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return -((1 - logarithm.exp()) ** gamma) * logarithm
    probability = outputs.sigmoid()
    missed = labels * (1 - probability) + (1 - labels) * probability
    entropy = functional.binary_cross_entropy_with_logits(
        outputs, labels, reduction="none", pos_weight=positive_weights
    )
    return (missed**gamma * entropy).mean(dim=1)


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


def class_shares(labels: Labels, num_classes: int) -> Tensor:
    """Return the share of each class in each sample, float32 (B, K)."""
    if not isinstance(labels, Tensor):
        own, partners = (class_shares(each, num_classes) for each in (labels.own, labels.partners))
        return torch.lerp(partners, own, labels.weights[:, None])
    return labels if labels.is_floating_point() else functional.one_hot(labels, num_classes).float()


BINARY: dict[str, Callable[..., Tensor]] = {
    "binary_cross_entropy": binary_cross_entropy, "asymmetric": asymmetric, "focal": focal,
}  # fmt: skip
"""Losses for samples with several labels. They take weights of the classes, (K,), for the samples that have them."""
CLASSIFICATION: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (cross_entropy, nll, perceptron, *BINARY.values())
}
RECONSTRUCTION: dict[str, Callable[..., Tensor]] = {"mse": mse, "l1": l1}
LOSSES = CLASSIFICATION | RECONSTRUCTION

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {
    "reduction": (Literal["mean", "sum"], "mean"),
    "class_weights": (Any, "none"),
}
"""Options of every loss: type and default. reduction: over the global batch, for the gradient; metrics are always means.
class_weights: none, balanced, or a mapping of class names to weights; others have 1. They weight a sample's training loss by
its label, and with several labels the part of a class in the loss of the samples that have it. balanced: the mean number of
samples of a class divided by its own; with several labels, the samples without it divided by those with it."""


@dataclass(frozen=True)
class Objective:
    """The losses for training and evaluation.

    Attributes:
        training_loss: outputs and targets in, one loss per sample out.
        evaluation_loss: the same without options that only serve training, such as label smoothing; an imported one has all.
        reconstructs: whether the images are the targets, so that no output is correct or wrong.
        finds_several: whether each class is decided on by itself, because samples have several labels.
        class_weights: float32 (classes,), of samples in training.
    """

    training_loss: Callable[..., Tensor]
    evaluation_loss: Callable[..., Tensor]
    reconstructs: bool
    auxiliary_weight: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    finds_several: bool = False
    class_weights: Tensor | None = None

    @property
    def classifies(self) -> bool:
        """Whether each sample gets one class, which is correct or wrong."""
        return not (self.reconstructs or self.finds_several)

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
        if not self.classifies:
            return 0
        main = outputs[0] if isinstance(outputs, tuple) else outputs
        return (main.argmax(dim=1) == one_label(labels if isinstance(labels, Tensor) else labels.heavier)).sum()

    def _sum(self, outputs: Tensor, targets: Labels) -> Tensor:
        if isinstance(targets, Tensor):
            return self._losses(outputs, targets).sum()
        own, partners = (self._losses(outputs, each) for each in (targets.own, targets.partners))
        return torch.lerp(partners, own, targets.weights).sum()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = self.class_weights
        if weights is None:
            return self.training_loss(outputs, targets)
        if self.finds_several:
            return self.training_loss(outputs, targets, weights)
        return self.training_loss(outputs, targets) * (
            targets @ weights if targets.is_floating_point() else weights[targets]
        )


def one_label(labels: Tensor) -> Tensor:
    """Return one label for each sample, int64 (B,): of shares (B, K), the class with the largest."""
    return labels.argmax(dim=1) if labels.is_floating_point() else labels


def build_objective(loss: dict[str, Any], model: dict[str, Any], several_labels: bool = False) -> Objective:
    """Build the objective of checked recipe sections; a model may have the option `auxiliary_weight`.

    `several_labels`: whether the targets are shares of all classes.
    """
    name = loss["name"]
    options = {key: loss[key] for key in loss if key not in ("name", *COMMON_OPTIONS)}
    training: Callable[..., Tensor]
    evaluation: Callable[..., Tensor]
    if is_import_path(name):
        training = evaluation = partial(call, f"loss.name={name}", load_function(name), **options)
    else:
        training, evaluation = partial(LOSSES[name], **options), LOSSES[name]
    return Objective(
        training_loss=training,
        evaluation_loss=evaluation,
        reconstructs=name in RECONSTRUCTION,
        auxiliary_weight=model.get("auxiliary_weight", 0.0),
        reduction=loss["reduction"],
        finds_several=several_labels and decides_each_class(name),
    )


def decides_each_class(name: str) -> bool:
    """Return whether a loss, given several labels, decides on each class by itself; imported ones do."""
    return name in BINARY or is_import_path(name)


def class_weights(
    option: Any, classes: Sequence[str], having: np.ndarray, samples: int, several: bool
) -> Tensor | None:
    """Return the weights of loss.class_weights, float32 (classes,); None for none.

    Args:
        option: none, balanced, or a mapping of names to weights.
        having: number of training samples that have each class, of `samples`.
        several: whether samples have several labels.

    Raises:
        InputError: there is no class of a name.
    """
    if option == "none":
        return None
    if option == "balanced":
        others = samples - having if several else np.full(len(classes), having.sum() / len(classes))
        return torch.from_numpy(np.where(having, others / np.maximum(having, 1), 1.0)).float()
    unknown = [name for name in option if str(name) not in classes]
    if unknown:
        raise InputError(f"loss.class_weights has no class {unknown[0]}; {neighbours(str(unknown[0]), classes)}")
    given = {str(name): float(weight) for name, weight in option.items()}
    return torch.tensor([given.get(name, 1.0) for name in classes])


def check_loss(section: dict[str, Any]) -> list[str]:
    """Check the options of a loss that its signature does not; return the problems."""
    option, name = section["class_weights"], section["name"]
    if option in ("none", None):
        return []
    if name in RECONSTRUCTION:
        return [f"loss.class_weights has no effect with loss.name={name}"]
    is_mapping = isinstance(option, dict) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        for weight in option.values()
    )
    if option == "balanced" or (is_mapping and option):
        return []
    return [f"loss.class_weights={option} must be none, balanced, or a mapping of class names to weights from 0"]


def check_labels(name: str, labels: LabelSets, where: str) -> None:
    """Check that a loss takes several labels.

    Raises:
        InputError: it does not, or needs shares that sum to 1.
    """
    if decides_each_class(name):
        return
    remedy = f"for labels that hold beside each other, use loss.name={' or '.join(BINARY)}"
    if name != "cross_entropy":
        raise InputError(
            f"loss.name={name} takes one label for each image, but those of {where} have several: {remedy}"
        )
    totals = np.zeros(len(labels))
    np.add.at(totals, np.repeat(np.arange(len(labels)), np.diff(labels.starts)), labels.entries["share"])
    if np.abs(totals - 1).max(initial=0) > _ROUNDING:
        sample = int(np.argmax(np.abs(totals - 1)))
        raise InputError(
            f"loss.name=cross_entropy takes shares of labels that sum to 1 for each image, but those of sample {sample} of "
            f"{where} sum to {totals[sample]:g}: {remedy}"
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
    if name not in RECONSTRUCTION and outputs.ndim != 2:
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
