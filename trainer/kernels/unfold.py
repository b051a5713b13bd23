"""Weight gradients of 3x3 convolutions in bf16 as one matrix product, for CPUs and small feature maps.

A filter's gradient is a sum over all pixels of all images: with the 3x3 neighbourhood of each pixel unfolded to a row, it is
the gradients of the outputs (N H W, O), transposed, times these rows (N H W, 9 C). For maps of a few pixels that is 1.1 to
3.8 times as fast as oneDNN's bf16 kernel. For larger maps it is slower, because it writes nine copies of the images. The rest
of the convolution is torch's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.trainer.kernels.common import compute_dtype, refuse_second_derivatives

# Fitted to 145 shapes on two cores of an AMD EPYC (AVX-512's bf16 units, torch 2.15.0): within these limits, at least 1.06
# times as fast.
_MOST_PIXELS = 4 * 4
_FEWEST_PAIRS = 128 * 128  # of an input and an output channel
_PART_BYTES = 64 << 20  # of rows at once


class UnfoldConv2d(nn.Conv2d):
    """nn.Conv2d whose weight gradient is a matrix product for feature maps where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if trains and compute_dtype(input, self.weight) == torch.bfloat16 and is_faster(self, input):
            bias = None if self.bias is None else self.bias.bfloat16()
            return convolve(input.bfloat16(), self.weight.bfloat16(), bias, int(self.padding[0]))
        return super().forward(input)


def is_faster(layer: nn.Conv2d, images: Tensor) -> bool:
    """Return whether a 3x3 convolution of images (N, C, H, W) gains."""
    height, width = (size + 2 * int(layer.padding[0]) - 2 for size in images.shape[-2:])
    pairs = layer.in_channels * layer.out_channels
    return images.ndim == 4 and min(height, width) > 0 and height * width <= _MOST_PIXELS and pairs >= _FEWEST_PAIRS


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Cross-correlate images (N, C, H, W) with 3x3 filters (O, C, 3, 3), bf16: (N, O, H + 2p - 2, W + 2p - 2).

    The backward pass is fast where images are torch.channels_last. It cannot itself be differentiated.

    Raises:
        NotImplementedError: in a backward pass with create_graph=True.
    """
    return _Convolution.apply(images, weight, bias, padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(images, weight)
        return functional.conv2d(images, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("unfold")
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            _images_gradient(images, weight, gradient, ctx.padding) if of_images else None,
            _weight_gradient(images, gradient, ctx.padding) if of_weight else None,
            gradient.sum(dim=(0, 2, 3)) if of_bias else None,
            None,
        )


def _images_gradient(images: Tensor, weight: Tensor, gradient: Tensor, padding: int) -> Tensor:
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, images, weight, bias_sizes=None, stride=[1, 1], padding=[padding, padding], dilation=[1, 1],
        transposed=False, output_padding=[0, 0], groups=1, output_mask=[True, False, False],
    )  # fmt: skip
    return found[0]


def _weight_gradient(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """Compute the filters' gradient (O, C, 3, 3) from images (N, C, H, W) and the outputs' gradient (N, O, H', W')."""
    channels, out_channels = images.shape[1], gradient.shape[1]
    inputs = functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    neighbourhoods = inputs.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (N, H', W', 3, 3, C), a view
    outputs = gradient.permute(0, 2, 3, 1)  # (N, H', W', O)
    at_once = max(1, _PART_BYTES // (2 * neighbourhoods.shape[1:].numel()))
    products = (
        part.reshape(-1, out_channels).T @ rows.reshape(-1, 9 * channels)
        for part, rows in zip(outputs.split(at_once), neighbourhoods.split(at_once), strict=True)
    )
    total = next(products)
    exact = torch.promote_types(total.dtype, torch.float32)  # bf16 would round after each part
    for product in products:
        total = total.to(exact) + product
    return total.to(gradient.dtype).view(out_channels, 3, 3, channels).permute(0, 3, 1, 2)
