"""3x3 convolutions in training with a quarter of the multiplications, for CPUs.

Winograd's minimal filtering F(4x4, 3x3), after Lavin and Gray 2015, arXiv 1509.09308: 4x4 outputs of a channel come from 6x6
inputs d and a filter g as A^T ((G g G^T) * (B^T d B)) A, where * is element-wise. Over many tiles and channels this is 36
matrix products, with 36 multiplications for 16 outputs instead of 144; the transforms are sums with few factors, along one
axis after the other. The method interpolates polynomials, here at 0, a, -a, b, -b and infinity, with a = 2/3 and b = 3/2:

    B^T = 1   0  -s   0   1   0      A^T = 1   1    1    1    1   0
          0  -b -b^2  a   1   0            0   a   -a    b   -b   0
          0   b -b^2 -a   1   0            0  a^2  a^2  b^2  b^2  0
          0  -a -a^2  b   1   0            0  a^3 -a^3  b^3 -b^3  1
          0   a -a^2 -b   1   0
          0   1   0  -s   0   1      s = a^2 + b^2; rows of G: (1, 0, 0), (1, x, x^2) / f(x) for x = a, -a, b, -b, (0, 0, 1)

where f(x) is the product of the distances of x from the other points. Rounding errors are less than half of those with the
usual points, 1 and 2.

The backward pass is the transpose of each step. The sums are in C (winograd.c): they read and write once, whereas torch would
do so for every addition. The same passes compute the bias and its gradient, and a ReLU after the layer and its gradient.
Results differ from torch's by rounding: about 1e-6 of their size in fp32, and 1.5 % in bf16, because the transformed tiles
are rounded, too. The order in which filters' gradients are summed depends on the caches and the number of threads. Without
gradients, as in an evaluation, the layer uses torch's convolution.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.datasets import native
from shardstep.trainer import machine
from shardstep.trainer.kernels.common import channels_last, compute_dtype, has_hooks, refuse_second_derivatives
from shardstep.trainer.kernels.unfold import UnfoldConv2d

_SOURCE = Path(__file__).with_suffix(".c")
_FORMATS = (torch.float32, torch.bfloat16)
_TILE, _SIDE = 4, 6  # outputs and inputs of a tile, per axis
# The transformed tiles of one part are twice the size of the threads' level-2 caches: they stay close between two steps.
_TIMES_CACHES, _LEAST_CACHE_BYTES = 2, 1 << 20  # the latter if a cache is smaller or its size unknown
# Each part adds to the gradients of all filters, so parts are larger for more pairs of an input and an output channel.
_PART_PAIRS = 128 * 128
_MOST_PART_BYTES = 64 << 20
_MOST_NUMBERS = 4 << 20  # in one image's tiles
_WORTH_IT = 1.3  # estimated speedup from which on to use it; the true one also depends on the processor


class WinogradConv2d(UnfoldConv2d):
    """nn.Conv2d that trains with Winograd's method on images for which it is faster; on others, in bf16, with `unfold`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input) if self._takes(input) else super().forward(input)

    def rectified(self, input: Tensor) -> Tensor:
        """Compute the outputs after a ReLU, without an additional pass over them."""
        return self._convolve(input, rectify=True) if self._takes(input) else functional.relu_(super().forward(input))

    def _takes(self, images: Tensor) -> bool:
        fits = images.device.type == "cpu" and compute_dtype(images, self.weight) in _FORMATS
        trains = torch.is_grad_enabled() and (images.requires_grad or self.weight.requires_grad)
        return fits and is_faster(self, images) and trains and not missing()

    def _convolve(self, images: Tensor, rectify: bool = False) -> Tensor:
        dtype = compute_dtype(images, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        return convolve(images.to(dtype), self.weight.to(dtype), bias, int(self.padding[0]), rectify)


class RectifyingSequential(nn.Sequential):
    """nn.Sequential whose WinogradConv2d layers also compute a following nn.ReLU, unless hooks need the values in between."""

    def forward(self, input: Tensor) -> Tensor:
        layers = deque(self)
        while layers:
            layer = layers.popleft()
            followed = len(layers) > 0 and type(layers[0]) is nn.ReLU
            if isinstance(layer, WinogradConv2d) and followed and not has_hooks(layer, layers[0]):
                layers.popleft()
                input = layer.rectified(input)
            else:
                input = layer(input)
        return input


def is_faster(layer: nn.Conv2d, images: Tensor) -> bool:
    """Return whether a 3x3 convolution of images (N, C, H, W) gains: most do in bf16, and in fp32 on many processors."""
    return _speedup(layer, images) > _WORTH_IT


def _speedup(layer: nn.Conv2d, images: Tensor) -> float:
    """Estimate the speedup; 0 for images that are not in a batch, smaller than the filter, or too large for the caches.

    It is the ratio of products, where the sums take as long as products of 48 channels. On two cores of an AMD EPYC (Zen 4,
    torch 2.15.0), of 23 shapes in bf16, the 14 above _WORTH_IT became 1.2 to 2.0 times as fast, the others 0.5 to 1.1.
    """
    height, width = (size + 2 * int(layer.padding[0]) - 2 for size in images.shape[-2:])
    tiles = -(-height // _TILE) * -(-width // _TILE)
    numbers = _image_numbers(tiles, layer.in_channels + layer.out_channels)
    if images.ndim != 4 or min(height, width) < 1 or numbers > _MOST_NUMBERS:
        return 0.0
    saved = 9 * height * width / (_SIDE**2 * tiles)
    return saved / (1 + 48 / layer.in_channels + 48 / layer.out_channels)


def missing() -> str | None:
    """Return what this machine lacks for the method, in a few words, or None."""
    return native.missing(_SOURCE)


@functools.cache
def _sums() -> ctypes.CDLL:
    return native.load(_SOURCE)


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int, rectify: bool = False) -> Tensor:
    """Cross-correlate images (N, C, H, W) with 3x3 filters (O, C, 3, 3), both fp32 or bf16: (N, O, H + 2p - 2, W + 2p - 2).

    With `rectify`, negative outputs become 0. It is fast for images in torch.channels_last. Outputs always are. There are no
    second derivatives.

    Raises:
        ValueError: the tensors are not all on the CPU, and all fp32 or all bf16.
        NotImplementedError: in a backward pass with create_graph=True.
    """
    return _Convolution.apply(images, weight, bias, padding, rectify)


class _Convolution(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # of the matrix products
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: int, rectify: bool) -> Tensor:
        bias = None if bias is None else bias.contiguous()
        given = [images, weight] if bias is None else [images, weight, bias]
        if {(part.device.type, part.dtype) for part in given} not in [{("cpu", dtype)} for dtype in _FORMATS]:
            raise ValueError("winograd: images, weight and bias must be on the CPU, all of fp32 or all of bf16")
        inputs, filters = channels_last(images), channels_last(weight)
        shape = (len(images), len(weight), *(size + 2 * padding - 2 for size in images.shape[2:]))
        # returns no view, so that an activation may work in place
        found = torch.empty(shape, dtype=images.dtype, memory_format=torch.channels_last)
        outputs = found.permute(0, 2, 3, 1)
        filter_tiles = _transform("filters", filters, _ONE_TILE)  # (36, O, C)
        ctx.save_for_backward(images, filter_tiles, found if rectify else None)
        ctx.padding = padding
        grid = _Grid.of(outputs, filter_tiles, padding)
        for part in grid.parts(len(images)):
            products = torch.bmm(_transform("inputs", inputs[part], grid), filter_tiles.transpose(1, 2))
            _collect("outputs", products, outputs[part], grid, bias=bias, rectify=rectify)
        return found

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("winograd")
        images, filter_tiles, rectified = ctx.saved_tensors
        of_images, of_weight, of_bias, *_ = ctx.needs_input_grad
        inputs, of_outputs = channels_last(images), channels_last(gradient)
        outputs = channels_last(rectified) if rectified is not None else None
        grid = _Grid.of(of_outputs, filter_tiles, ctx.padding)
        inputs_gradient = torch.empty_like(inputs) if of_images else None
        # in fp32, because bf16 would round after each part
        filters_gradient = (
            torch.zeros(of_outputs.shape[3], 3, 3, inputs.shape[3], dtype=torch.float32) if of_weight else None
        )
        bias_gradient = torch.zeros(of_outputs.shape[3], dtype=torch.float32) if of_bias else None
        for part in grid.parts(len(images)):
            rectified_part = outputs[part] if outputs is not None else None
            products, sums = _transform_gradient(of_outputs[part], rectified_part, grid, with_sums=of_bias)
            if filters_gradient is not None:
                of_filter_tiles = torch.bmm(products.transpose(1, 2), _transform("inputs", inputs[part], grid))
                _collect("filters", of_filter_tiles, filters_gradient, _ONE_TILE)
            if inputs_gradient is not None:
                _collect("inputs", torch.bmm(products, filter_tiles), inputs_gradient[part], grid)
            if bias_gradient is not None and sums is not None:
                bias_gradient += sums.sum(dim=0)
        return (
            inputs_gradient.permute(0, 3, 1, 2) if inputs_gradient is not None else None,
            filters_gradient.permute(0, 3, 1, 2).to(images.dtype) if filters_gradient is not None else None,
            bias_gradient.to(images.dtype) if bias_gradient is not None else None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Grid:
    """How tiles cover the outputs of an image, and how many images to process at once."""

    padding: int
    down: int  # tiles
    right: int
    images: int

    @classmethod
    def of(cls, outputs: Tensor, filter_tiles: Tensor, padding: int) -> "_Grid":
        """Build the grid for outputs (N, H, W, O) and filters (36, O, C)."""
        down, right = -(-outputs.shape[1] // _TILE), -(-outputs.shape[2] // _TILE)
        out_channels, channels = filter_tiles.shape[1:]
        part_bytes = min(_part_bytes() * max(1, out_channels * channels // _PART_PAIRS), _MOST_PART_BYTES)
        image_bytes = outputs.itemsize * _image_numbers(down * right, out_channels + channels)
        return cls(padding, down, right, max(1, part_bytes // image_bytes))

    def parts(self, count: int) -> Iterator[slice]:
        """Yield the parts of a batch of `count` images; at least one, even for no images."""
        return (slice(start, start + self.images) for start in range(0, max(count, 1), self.images))

    def rows(self, count: int) -> int:
        """Return the number of tiles of `count` images, made odd by a row of zeros: an even number of rows apart, the 36
        numbers of a tile would compete for the same lines of a processor's caches."""
        return count * self.down * self.right | 1


_ONE_TILE = _Grid(padding=0, down=1, right=1, images=1)


def _part_bytes() -> int:
    return _TIMES_CACHES * _cache_bytes() * torch.get_num_threads()


@functools.cache
def _cache_bytes() -> int:
    """Return the bytes of a core's level-2 cache."""
    return max(_LEAST_CACHE_BYTES, machine.level_2_cache_bytes())


def _image_numbers(tiles: int, channels: int) -> int:
    """Return how many numbers the transformed tiles of one image hold; `channels` are those of inputs and outputs."""
    return _SIDE**2 * tiles * channels


class _Shape(ctypes.Structure):
    """The struct Shape of winograd.c."""

    _NUMBERS = "count height width channels padding down right rows half threads rectify"
    _fields_ = [
        *((name, ctypes.c_long) for name in _NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in ("bias", "outputs", "pixel_sums")),
    ]


def _transform(kind: str, images: Tensor, grid: _Grid) -> Tensor:
    """Transform inputs or filters (n, H, W, C) to tiles (36, rows, C)."""
    rows = len(images) if kind == "filters" else grid.rows(len(images))
    tiles = images.new_empty(_SIDE**2, rows, images.shape[-1])
    _call(f"transform_{kind}", images, tiles, images, grid)
    return tiles


def _transform_gradient(
    gradient: Tensor, rectified: Tensor | None, grid: _Grid, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Transform the outputs' gradient (n, H, W, O), masked if they were rectified, to tiles (36, rows, O); also return the
    sums over each tile's pixels (rows, O)."""
    rows, channels = grid.rows(len(gradient)), gradient.shape[-1]
    tiles = gradient.new_empty(_SIDE**2, rows, channels)
    sums = torch.empty(rows, channels, dtype=torch.float32) if with_sums else None
    _call("transform_gradient", gradient, tiles, gradient, grid, outputs=rectified, pixel_sums=sums)
    return tiles, sums


def _collect(
    kind: str, tiles: Tensor, images: Tensor, grid: _Grid, bias: Tensor | None = None, rectify: bool = False
) -> None:
    """Write tiles to inputs or outputs, or add them to float32 filters; all in place."""
    _call(f"collect_{kind}", tiles, images, images, grid, bias=bias, rectify=rectify)


def _call(
    function: str, source: Tensor, target: Tensor, images: Tensor, grid: _Grid, *,
    rectify: bool = False, bias: Tensor | None = None, outputs: Tensor | None = None, pixel_sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Call a function of winograd.c with torch's number of threads. Tensors are contiguous; `images` is source or target."""
    rows = (source if images is target else target).shape[1]
    half, threads = source.dtype == torch.bfloat16, torch.get_num_threads()
    also = (None if tensor is None else tensor.data_ptr() for tensor in (bias, outputs, pixel_sums))
    shape = _Shape(*images.shape, grid.padding, grid.down, grid.right, rows, half, threads, rectify, *also)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, target))
    getattr(_sums(), function)(*pointers, ctypes.byref(shape))
