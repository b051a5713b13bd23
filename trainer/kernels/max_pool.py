"""The backward pass of max pooling on a CPU, several times as fast as torch's for windows that do not overlap.

Each pixel then belongs to one window, so its gradient can be written in one pass, whereas torch sets all gradients to zero
first and then adds. The results are bitwise the same. The forward pass is torch's; the loop is in C (max_pool.c).
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shardstep.datasets import native
from shardstep.trainer.kernels.common import channels_last

_SOURCE = Path(__file__).with_suffix(".c")
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class SideBySideMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d whose windows neither overlap nor leave gaps, with the faster backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        fits = input.ndim == 4 and input.device.type == "cpu" and input.dtype in _FORMATS
        if fits and torch.is_grad_enabled() and input.requires_grad and not native.missing(_SOURCE):
            return _MaxPool.apply(input, self.kernel_size)
        return super().forward(input)


def convert_max_pools(model: nn.Module) -> None:
    """Give a model's max-pooling layers the faster backward pass, where their windows allow it."""
    for layer in model.modules():
        if type(layer) is nn.MaxPool2d and _lie_side_by_side(layer):
            layer.__class__ = SideBySideMaxPool2d


def _lie_side_by_side(layer: nn.MaxPool2d) -> bool:
    return (
        isinstance(layer.kernel_size, int)
        and layer.stride == layer.kernel_size
        and layer.padding == 0
        and layer.dilation == 1
        and not layer.ceil_mode
        and not layer.return_indices
    )


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(_SOURCE)


class _Shape(ctypes.Structure):
    """The struct Shape of max_pool.c."""

    _fields_ = [(name, ctypes.c_long) for name in ("count", "height", "width", "channels", "size", "bytes", "threads")]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, size: int) -> Tensor:
        """Images (N, C, H, W) -> (N, C, H // size, W // size)."""
        outputs, indices = functional.max_pool2d(images, size, return_indices=True)
        ctx.save_for_backward(indices)
        ctx.size, ctx.shape = size, images.shape
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        outputs, indices = channels_last(gradient), channels_last(*ctx.saved_tensors)
        found = torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        images = found.permute(0, 2, 3, 1)
        shape = _Shape(*images.shape, ctx.size, images.itemsize, torch.get_num_threads())
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (outputs, indices, images))
        _library().max_pool_backward(*pointers, ctypes.byref(shape))
        return found, None
