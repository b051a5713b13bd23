"""Crops of decoded pixels, scaled with antialiasing: in C (scale.c), or by torch where there is no compiler.

Both compute the same pixels to the last bit.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from shardstep.datasets import native
from shardstep.datasets.framing import Crop, Interpolation

_SOURCE = Path(__file__).with_suffix(".c")


class Side(ctypes.Structure):
    """`struct side` of crop.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("start", "length", "scaled", "first", "count")]


def sides_of(crop: Crop) -> tuple[Side, Side]:
    """Return the rows and the columns of a crop."""
    region, (height, width), window = crop.region, crop.scaled, crop.window
    rows = Side(region.top, region.height, height, window.top, window.height)
    columns = Side(region.left, region.width, width, window.left, window.width)
    return rows, columns


def cut_and_scale(
    pixels: np.ndarray, crop: Crop, interpolation: Interpolation, out: np.ndarray | None = None
) -> np.ndarray:
    """Apply a crop to uint8 pixels (height, width, 1 or 3 channels), with Pillow's antialiasing.

    Args:
        out: contiguous memory for the result, which is used, and returned, where that saves a copy.
    """
    region, window = crop.region, crop.window
    if (region.height, region.width) != crop.scaled:
        scale = _by_torch if native.missing(_SOURCE) else _in_c
        return scale(pixels, crop, interpolation, out)
    top, left = region.top + window.top, region.left + window.left
    return pixels[top : top + window.height, left : left + window.width]


def _in_c(pixels: np.ndarray, crop: Crop, interpolation: Interpolation, out: np.ndarray | None) -> np.ndarray:
    if not pixels[:1].flags.c_contiguous:  # rows may be any number of bytes apart
        pixels = np.ascontiguousarray(pixels)
    channels = pixels.shape[2]
    if out is None:
        out = np.empty((crop.window.height, crop.window.width, channels), dtype=np.uint8)
    rows, columns = sides_of(crop)
    result = native.call_with_scratch(
        lambda scratch: _library().scale_crop(
            ctypes.c_void_p(pixels.ctypes.data), ctypes.c_ssize_t(pixels.strides[0]), channels, ctypes.byref(rows),
            ctypes.byref(columns), int(interpolation == "bicubic"), ctypes.byref(scratch), ctypes.c_void_p(out.ctypes.data),
        )
    )  # fmt: skip
    assert result == native.DONE
    return out


def _by_torch(pixels: np.ndarray, crop: Crop, interpolation: Interpolation, out: np.ndarray | None) -> np.ndarray:
    region, window = crop.region, crop.window
    pixels = pixels[region.top : region.top + region.height, region.left : region.left + region.width]
    pixels = np.ascontiguousarray(pixels)  # torch would copy it more slowly
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # (H, W, C) -> (1, C, H, W)
    scaled = functional.interpolate(images, crop.scaled, mode=interpolation, antialias=True)
    pixels = scaled[0].permute(1, 2, 0).numpy()
    return pixels[window.top : window.top + window.height, window.left : window.left + window.width]


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(_SOURCE)
