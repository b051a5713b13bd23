"""Gradients of 3x3 convolutions in fp32 with a quarter of the multiplications, for CPUs.

Winograd's minimal filtering F(4x4, 3x3), after Lavin and Gray 2015, arXiv 1509.09308: 4x4 outputs of a channel come from 6x6
inputs d and a filter g as A^T ((G g G^T) * (B^T d B)) A, where * goes element by element. Over many tiles and channels this
is 36 matrix products, with 36 multiplications for 16 outputs in place of 144; B^T and A^T are sums with small factors, along
one axis after the other:

    B^T = 4  0 -5  0  1  0      A^T = 1  1  1  1  1  0
          0 -4 -4  1  1  0            0  1 -1  2 -2  0
          0  4 -4 -1  1  0            0  1  1  4  4  0
          0 -2 -1  2  1  0            0  1 -1  8 -8  1
          0  2 -1 -2  1  0
          0  4  0 -5  0  1

The backward pass is the transpose of each step. The forward pass would gain a few percent: it is left to torch, so that
outputs are those of any other convolution. Gradients are rounded otherwise, and differ by about 1e-5 of the largest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_TILE, _SIDE = 4, 6  # outputs and inputs of a tile, per axis
_PART_BYTES = 16 << 20  # of transformed tiles at once, few enough to stay in a processor's caches between two steps
_WORTH_IT = 1.3  # times as fast: below, it depends on the processor
_FILTERS = torch.tensor(  # G
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d whose backward pass goes by Winograd's method for images of a size that makes it faster."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and _is_float32(input, self.weight) and is_faster(self, input):
            return convolve(input, self.weight, self.bias, int(self.padding[0]))
        return super().forward(input)


def _is_float32(images: Tensor, weight: Tensor) -> bool:
    return images.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def is_faster(layer: nn.Conv2d, images: Tensor) -> bool:
    """Whether the backward pass of a 3x3 convolution of images (N, C, H, W) gains."""
    return _speedup(layer, images) > _WORTH_IT


def _speedup(layer: nn.Conv2d, images: Tensor) -> float:
    """About how many times as fast the backward pass becomes; 0 for images that are not in a batch, smaller than the filter,
    or too large for the caches.

    Products saved, where the sums take as long as products of 64 channels would. That was fitted to 22 shapes on two cores
    with AVX2 (AMD EPYC, torch 2.15.0), where 0.6 to 3.0 times as fast were measured.
    """
    height, width = (size + 2 * int(layer.padding[0]) - 2 for size in images.shape[-2:])
    if images.ndim != 4 or min(height, width) < 1 or _image_bytes(layer.weight, height, width) > _PART_BYTES:
        return 0.0
    saved = 9 * height * width / (_SIDE**2 * _num_tiles(height, width))
    return saved / (1 + 64 / layer.in_channels + 64 / layer.out_channels)


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Cross-correlate images (N, C, H, W) with 3x3 filters (O, C, 3, 3), float32: (N, O, H + 2p - 2, W + 2p - 2).

    The backward pass is fast where images are torch.channels_last. It cannot itself be differentiated.

    Raises:
        NotImplementedError: in a backward pass with create_graph=True.
    """
    return _Convolution.apply(images, weight, bias, padding)


class TorchForward(torch.autograd.Function):
    """A convolution whose forward pass is torch's, and whose backward pass is left to a subclass."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(images, weight)
        return functional.conv2d(images, weight, bias, padding=padding)


class _Convolution(TorchForward):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("winograd")
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, _ = ctx.needs_input_grad
        inputs, outputs = images.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        grid = _Grid.of(outputs, weight, ctx.padding)
        filters = _transform_filters(weight) if of_images else None  # (36, O, C)
        inputs_gradient = torch.empty_like(inputs, memory_format=torch.contiguous_format) if of_images else None
        filters_gradient = weight.new_zeros(_SIDE**2, weight.shape[1], len(weight)) if of_weight else None
        for part in grid.parts(len(images)):
            products = _transform_outputs(outputs[part], grid)  # their gradient, (36, tiles, O)
            if filters_gradient is not None:
                filters_gradient.baddbmm_(_transform_inputs(inputs[part], grid).transpose(1, 2), products)
            if filters is not None and inputs_gradient is not None:
                _collect_inputs(torch.bmm(products, filters), inputs_gradient[part], grid)
        return (
            inputs_gradient.permute(0, 3, 1, 2) if inputs_gradient is not None else None,
            _collect_filters(filters_gradient) if filters_gradient is not None else None,
            gradient.sum(dim=(0, 2, 3)) if of_bias else None,
            None,
        )


def refuse_second_derivatives(method: str) -> None:
    """In a backward pass that knows nothing of how its gradients depend on images and weights."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"train.conv_gradients={method}: its gradients have no gradients themselves; use train.conv_gradients=direct"
        )


@dataclass(frozen=True)
class _Grid:
    """How tiles cover the outputs of an image, and how many images are worked on at once."""

    padding: int
    down: int  # tiles
    right: int
    images: int

    @classmethod
    def of(cls, outputs: Tensor, weight: Tensor, padding: int) -> "_Grid":
        """For outputs (N, H, W, O)."""
        down, right = -(-outputs.shape[1] // _TILE), -(-outputs.shape[2] // _TILE)
        return cls(padding, down, right, max(1, _PART_BYTES // _image_bytes(weight, *outputs.shape[1:3])))

    def parts(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.images) for start in range(0, count, self.images))


def _num_tiles(height: int, width: int) -> int:
    return -(-height // _TILE) * -(-width // _TILE)


def _image_bytes(weight: Tensor, height: int, width: int) -> int:
    """Of the transformed tiles of one image, for outputs of this size."""
    return 4 * _SIDE**2 * _num_tiles(height, width) * (weight.shape[0] + weight.shape[1])


def _transform_outputs(outputs: Tensor, grid: _Grid) -> Tensor:
    """A y A^T: (n, height, width, O) -> (36, tiles, O)."""
    count, height, width, channels = outputs.shape
    down, right = grid.down, grid.right
    whole = outputs.new_zeros(count, _TILE * down, _TILE * right, channels)
    whole[:, :height, :width] = outputs
    rows = outputs.new_empty(_SIDE, count, down, _TILE * right, channels)
    _apply_a([whole[:, row::_TILE] for row in range(_TILE)], rows.unbind(0))
    tiles = outputs.new_empty(_SIDE, _SIDE, count, down, right, channels)
    _apply_a([rows[..., column::_TILE, :] for column in range(_TILE)], tiles.unbind(1))
    return tiles.view(_SIDE**2, -1, channels)


def _transform_inputs(images: Tensor, grid: _Grid) -> Tensor:
    """B^T d B: (n, H, W, C) -> (36, tiles, C), of the padded images' overlapping tiles."""
    count, height, width, channels = images.shape
    down, right, pad = _TILE * grid.down, _TILE * grid.right, grid.padding
    padded = images.new_zeros(count, down + 2, right + 2, channels)
    padded[:, pad : pad + height, pad : pad + width] = images
    rows = images.new_empty(_SIDE, count, grid.down, right + 2, channels)
    _apply_b_transposed([padded[:, row : row + down - 3 : _TILE] for row in range(_SIDE)], rows.unbind(0))
    tiles = images.new_empty(_SIDE, _SIDE, count, grid.down, grid.right, channels)
    columns = [rows[..., column : column + right - 3 : _TILE, :] for column in range(_SIDE)]
    _apply_b_transposed(columns, tiles.unbind(1))
    return tiles.view(_SIDE**2, -1, channels)


def _collect_inputs(tiles: Tensor, images: Tensor, grid: _Grid) -> None:
    """B t B^T, the transpose of `_transform_inputs`: (36, tiles, C) -> images (n, H, W, C), in place."""
    count, height, width, channels = images.shape
    down, right, pad = grid.down, grid.right, grid.padding
    rows = tiles.new_empty(_SIDE, count, down + 1, _TILE, right, channels)
    rows[:, :, -1] = 0  # behind the last tile there is what it shares alone
    whole = tiles.view(_SIDE, _SIDE, count, down, right, channels)
    _apply_b(whole.unbind(0), rows[:, :, :-1].unbind(3), rows[:, :, 1:].unbind(3))
    pixels = tiles.new_empty(count, down + 1, _TILE, right + 1, _TILE, channels)
    pixels[:, :, :, -1] = 0
    _apply_b(rows.unbind(0), pixels[:, :, :, :-1].unbind(4), pixels[:, :, :, 1:].unbind(4))
    padded = pixels.view(count, _TILE * (down + 1), _TILE * (right + 1), channels)
    images.copy_(padded[:, pad : pad + height, pad : pad + width])


def _transform_filters(weight: Tensor) -> Tensor:
    """G g G^T: (O, C, 3, 3) -> (36, O, C)."""
    out_channels, channels = weight.shape[:2]
    both_axes = torch.kron(_FILTERS, _FILTERS)  # (36, 9)
    return (both_axes @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(_SIDE**2, out_channels, channels)


def _collect_filters(gradient: Tensor) -> Tensor:
    """G^T u G: (36, C, O) -> (O, C, 3, 3)."""
    _, channels, out_channels = gradient.shape
    both_axes = torch.kron(_FILTERS, _FILTERS)
    return (both_axes.T @ gradient.view(_SIDE**2, -1)).view(3, 3, channels, out_channels).permute(3, 2, 0, 1)


def _apply_a(y: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    out[0].copy_(y[0])
    even, odd = y[0] + y[2], y[1] + y[3]
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    even, odd = torch.add(y[0], y[2], alpha=4), torch.add(y[1], y[3], alpha=4).mul_(2)
    torch.add(even, odd, out=out[3])
    torch.sub(even, odd, out=out[4])
    out[5].copy_(y[3])


def _apply_b_transposed(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.add(d[4], d[2], alpha=-5, out=out[0]).add_(d[0], alpha=4)
    even, odd = torch.add(d[4], d[2], alpha=-4, out=out[2]), torch.add(d[3], d[1], alpha=-4, out=out[5])
    torch.add(even, odd, out=out[1])
    even.sub_(odd)
    even, odd = torch.sub(d[4], d[2], out=out[4]), torch.sub(d[3], d[1], out=out[5])
    torch.add(even, odd, alpha=2, out=out[3])
    even.sub_(odd, alpha=2)
    torch.add(d[5], d[3], alpha=-5, out=out[5]).add_(d[1], alpha=4)


def _apply_b(t: Sequence[Tensor], own: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
    """A tile's first four pixels to its `own`; its last two are added to `shared`, the next tile's first."""
    sum_12, difference_12, sum_34, difference_34 = t[1] + t[2], t[1] - t[2], t[3] + t[4], t[3] - t[4]
    torch.mul(t[0], 4, out=own[0])
    torch.sub(t[5], difference_12, out=own[1]).mul_(4).sub_(difference_34, alpha=2)
    torch.add(sum_34, sum_12, alpha=4, out=own[2]).add_(t[0], alpha=5).neg_()
    torch.add(difference_12, difference_34, alpha=2, out=own[3]).sub_(t[5], alpha=5)
    shared[0].add_(sum_12.add_(sum_34).add_(t[0]))
    shared[1].add_(t[5])
