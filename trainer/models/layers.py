"""Layers that models choose by name: activations, pooling, output layers."""

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
    """Build an activation layer by name.

    Args:
        name: sigmoid 1 / (1 + e^-x); tanh; relu max(0, x); leaky_relu x above 0 and `negative_slope` x below; elu x above 0
            and e^x - 1 below; gelu x Phi(x) with the normal distribution's Phi; silu x / (1 + e^-x).
        negative_slope: of leaky_relu, 0.01 if None.

    Raises:
        ValueError: the name is unknown, or `negative_slope` is given with another activation than leaky_relu.
    """
    if name == "leaky_relu":
        return nn.LeakyReLU(0.01 if negative_slope is None else negative_slope)
    if negative_slope is not None:
        raise ValueError(f"negative_slope belongs to activation=leaky_relu and has no effect with {name}")
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation={name} is unknown; known: {', '.join(get_args(Activation))}")
    return _ACTIVATIONS[name]()


def output_layer(name: OutputActivation) -> nn.Module:
    """Build the layer after the last linear one: none (logits), a ReLU, or log-probabilities for loss.name=nll."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "log_softmax": partial(nn.LogSoftmax, dim=1),
    }
    return layers[name]()


class Pool(nn.Module):
    """Pool windows of `size` pixels a side: (B, C, H, W) -> (B, C, H // stride, W // stride) without padding.

    The options are those of nn.MaxPool2d. Padding is ignored by a maximum or minimum, and counts as 0 in an average.
    """

    def __init__(self, kind: Pooling, size: int, stride: int | None = None, padding: int = 0, ceil_mode: bool = False):
        super().__init__()
        self._kind = kind
        layer = nn.AvgPool2d if kind == "avg" else nn.MaxPool2d
        self._pool = layer(size, stride, padding, ceil_mode=ceil_mode)

    def forward(self, features: Tensor) -> Tensor:
        return -self._pool(-features) if self._kind == "min" else self._pool(features)

    def extra_repr(self) -> str:
        return self._kind


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


def check_size(image_shape: tuple[int, int, int], smallest: int) -> None:
    """Check that images (channels, height, width) have at least `smallest` pixels a side.

    Raises:
        ValueError: they do not; the message says which size the model needs.
    """
    _, height, width = image_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {width}x{height} pixels are too small, it needs {smallest}x{smallest}: give "
            f"data.resize={smallest} or more, or another model"
        )
