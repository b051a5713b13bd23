"""Layers that models choose by name: activations and global pooling."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

Activation = Literal["sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "silu"]
Pooling = Literal["max", "min", "avg"]
OutputActivation = Literal["none", "relu", "log_softmax"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": partial(nn.ReLU, inplace=True),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def activation_layer(name: Activation, negative_slope: float | None = None) -> nn.Module:
    """An activation by name.

    Args:
        name: which one.
        negative_slope: of leaky_relu, 0.01 if None.

    Raises:
        ValueError: the name is unknown, or `negative_slope` comes with another activation than leaky_relu.
    """
    if name == "leaky_relu":
        return nn.LeakyReLU(0.01 if negative_slope is None else negative_slope)
    if negative_slope is not None:
        raise ValueError(f"negative_slope belongs to activation=leaky_relu and has no effect with {name}")
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation={name} is unknown; known: {', '.join(get_args(Activation))}")
    return _ACTIVATIONS[name]()


def output_layer(name: OutputActivation) -> nn.Module:
    """What follows the last linear layer: nothing (logits), a ReLU, or log-probabilities for loss.name=nll."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "log_softmax": partial(nn.LogSoftmax, dim=1),
    }
    return layers[name]()


class GlobalPool(nn.Module):
    """Pool each channel to one number: (B, C, H, W) -> (B, C)."""

    def __init__(self, kind: Pooling):
        super().__init__()
        self._kind = kind

    def forward(self, features: Tensor) -> Tensor:
        if self._kind == "avg":
            return features.mean(dim=(2, 3))
        return features.amax(dim=(2, 3)) if self._kind == "max" else features.amin(dim=(2, 3))

    def extra_repr(self) -> str:
        return self._kind
