"""Alternatives to torch's 3x3 convolutions for training on a CPU: the methods, and which models gain from them."""

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from shardstep.configs.schema import Precision, TrainConfig
from shardstep.trainer.kernels import unfold, winograd


class ConvolutionMethod(NamedTuple):
    """A value of train.convolutions.

    Attributes:
        layer: replaces nn.Conv2d.
        is_faster: returns whether a convolution of images (N, C, H, W) gains.
        missing: returns what this machine lacks for it, in a few words, or None.
    """

    precisions: tuple[Precision, ...]
    layer: type[nn.Conv2d]
    is_faster: Callable[[nn.Conv2d, Tensor], bool]
    missing: Callable[[], str | None] = lambda: None


CONVOLUTION_METHODS = {
    "winograd": ConvolutionMethod(("bf16", "fp32"), winograd.WinogradConv2d, winograd.is_faster, winograd.missing),
    "unfold": ConvolutionMethod(("bf16",), unfold.UnfoldConv2d, unfold.is_faster),
}


def convert_convolutions(model: nn.Module, method: str) -> None:
    """Let a model's 3x3 convolutions train with a method, where it is faster; winograd also computes the ReLU after them."""
    for layer in model.modules():
        if _is_plain(layer):
            layer.__class__ = CONVOLUTION_METHODS[method].layer
        elif type(layer) is nn.Sequential and method == "winograd":
            layer.__class__ = winograd.RectifyingSequential


@torch.no_grad()
def gains(model: nn.Module, image_shape: tuple[int, int, int], method: str) -> bool:
    """Return whether a method makes some convolution of a model faster, for images (channels, height, width)."""
    faster = [False]

    def check(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        faster.append(CONVOLUTION_METHODS[method].is_faster(cast(nn.Conv2d, layer), (*given, *named.values())[0]))

    if any(_is_plain(layer) for layer in model.modules()):
        model = copy.deepcopy(model).eval()
        for layer in filter(_is_plain, model.modules()):
            layer.register_forward_pre_hook(check, with_kwargs=True)
        model(torch.zeros(1, *image_shape))
    return any(faster)


def excludes(config: TrainConfig, method: str) -> list[str]:
    """Return the values of a recipe that exclude a method, as key=value."""
    fitting = {
        "precision": ("auto", *CONVOLUTION_METHODS[method].precisions),
        "compile": ("none",),
        "device": ("auto", "cpu"),
    }
    return [
        f"train.{key}={getattr(config, key)}" for key, values in fitting.items() if getattr(config, key) not in values
    ]


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding in ((0, 0), (1, 1))
        and layer.padding_mode == "zeros"
    )
