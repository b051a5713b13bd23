"""Bytes of an image file to pixels of one size: decodes what a framing keeps of a picture, and scales it.

Crop version 3 decodes only the part of a JPEG that the crop needs, in C (jpeg_crop.c). All other files, and those that
this code gives up on, are decoded entirely and then cut and scaled (scale.py): so one decoder decides what is damaged.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardstep.configs.schema import CropVersion, Orientation
from shardstep.datasets import native
from shardstep.datasets.decode import decode, resize_to_cover
from shardstep.datasets.framing import Crop, Framing, Interpolation
from shardstep.datasets.orientation import UPRIGHT, turn_of
from shardstep.datasets.scale import cut_and_scale, sides_of

PARTIAL: CropVersion = 3
"""The crop version that decodes only what is needed."""
_SOURCE, _LIBRARIES = Path(__file__).with_name("jpeg_crop.c"), ("jpeg",)
_MOST_PIXELS = 2**30  # as in OpenCV
_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
_FRAMES, _SCAN = (0xC0, 0xC1, 0xC2), 0xDA  # markers; the frames are baseline, extended and progressive


def missing_for_partial() -> str | None:
    """Return what this machine lacks for decoding only parts of JPEGs, in a few words, or None."""
    lacks = native.missing(_SOURCE, _LIBRARIES)
    return f"libjpeg's header and {lacks}" if lacks else None


def decode_crop(
    data: bytes,
    mode: str,
    framing: Framing,
    draws: Sequence[float] | None = None,
    out: np.ndarray | None = None,
    orientation: Orientation = "ignore",
) -> np.ndarray:
    """Decode an image file to uint8 pixels of a framing, shape (height, width, channels).

    Args:
        mode: "RGB" or "L", as for `decode`.
        draws: the numbers of a random crop, see framing.py; None reads the centre.
        out: contiguous memory for the pixels, which is used, and returned, where that saves a copy.
        orientation: as for `decode`; a crop is one of the upright picture.

    Raises:
        ValueError: see `decode`.
    """
    shape = jpeg_shape(data) if framing.version == PARTIAL else None
    if shape and (mode == "RGB" or shape[2] == 1):
        turn = turn_of(data) if orientation == "follow" else UPRIGHT
        height, width = turn.size(*shape[:2])
        crop = framing.crop(height, width, draws)
        if turn != UPRIGHT:
            crop = turn.stored_crop(crop, height, width)
        part = out if mode == "RGB" and turn == UPRIGHT else None
        if part is None:
            part = np.empty((crop.window.height, crop.window.width, 3), dtype=np.uint8)
        if _decode_part(data, crop, framing.interpolation, part):
            pixels = part if turn == UPRIGHT else turn.pixels(part)
            return pixels if mode == "RGB" else pixels[:, :, :1]
    pixels = decode(data, mode, orientation)
    if framing.version == 1:
        return resize_to_cover(pixels, framing.height, framing.width)
    crop = framing.crop(pixels.shape[0], pixels.shape[1], draws)
    return cut_and_scale(pixels, crop, framing.interpolation, out)


def jpeg_shape(data: bytes) -> tuple[int, int, int] | None:
    """Return (height, width, channels) of a JPEG that does not end early, from its frame header; None for other files."""
    if data[:2] != _JPEG or data[-2:] != _END_OF_JPEG:
        return None
    place = 2
    while data[place : place + 1] == b"\xff":
        segment = data[place : place + 10]
        if segment[1] in _FRAMES and len(segment) == 10:
            height, width = int.from_bytes(segment[5:7], "big"), int.from_bytes(segment[7:9], "big")
            return (height, width, segment[9]) if 0 < height * width <= _MOST_PIXELS else None
        if len(segment) < 10 or segment[1] == _SCAN:
            return None
        place += 2 + int.from_bytes(segment[2:4], "big")
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return native.load(_SOURCE, _LIBRARIES)


def _decode_part(data: bytes, crop: Crop, interpolation: Interpolation, out: np.ndarray) -> bool:
    """Decode a crop of a JPEG to `out`, uint8 (height, width, 3); return False if the C code gives up on the file."""
    rows, columns = sides_of(crop)
    result = native.call_with_scratch(
        lambda scratch: _library().crop_jpeg(
            data, ctypes.c_size_t(len(data)), ctypes.byref(rows), ctypes.byref(columns), int(interpolation == "bicubic"),
            ctypes.byref(scratch), ctypes.c_void_p(out.ctypes.data),
        )
    )  # fmt: skip
    return result == native.DONE
