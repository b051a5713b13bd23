"""Bytes of an image file to an array of pixels, and back.

OpenCV's decoders are the fastest that are well maintained, and they release the GIL, so that threads decode in parallel.
OpenCV is imported when the first image is decoded.
"""

from functools import lru_cache
from typing import Any

import numpy as np

EXTENSIONS = ("png", "jpg", "jpeg", "webp")


@lru_cache(maxsize=1)
def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(0)  # we decode one image per thread
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # decode() raises instead
    return cv2


@lru_cache
def _flag(mode: str) -> int:
    cv2 = _cv2()
    flags = {
        "RGB": cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        "L": cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
        "UNCHANGED": cv2.IMREAD_UNCHANGED,
    }
    return int(flags[mode])


def decode(data: bytes, mode: str) -> np.ndarray:
    """Decode an image file to uint8, shape (height, width, channels). EXIF orientation and transparency are dropped.

    `mode`: "RGB", "L", or "UNCHANGED" for one or three channels, as in the file.

    Raises:
        ValueError: the bytes are not an 8-bit image.
    """
    if not data:
        raise ValueError("not an image that can be decoded: it is empty")
    cv2 = _cv2()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _flag(mode))
    except cv2.error as error:  # for example, an absurd size
        raise ValueError(f"not an image that can be decoded ({error.err})") from None
    if pixels is None:
        raise ValueError("not an image that can be decoded")
    if pixels.dtype != np.uint8:
        raise ValueError(f"{8 * pixels.itemsize} bits per channel; only 8 are supported")
    if pixels.ndim == 2:
        return pixels[:, :, np.newaxis]
    if mode == "UNCHANGED":  # in OpenCV's channel order, possibly with transparency
        return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    return pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels of shape (height, width, 1 or 3) as PNG."""
    cv2 = _cv2()
    written, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else pixels)
    assert written
    return data.tobytes()


def resize_to_cover(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale an image until it just covers a frame and crop the centre. uint8, shape (height, width, channels).

    Downscaling averages areas, upscaling is bilinear.
    """
    own_height, own_width, channels = pixels.shape
    if (own_height, own_width) == (height, width):
        return pixels
    cv2 = _cv2()
    scale = max(height / own_height, width / own_width)
    new_height, new_width = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(pixels, (new_width, new_height), interpolation=way).reshape(new_height, new_width, channels)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return scaled[top : top + height, left : left + width]
