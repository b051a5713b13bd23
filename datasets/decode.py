"""Bytes of an image file to an array of pixels, and back: the one decoder, for whatever checks, trains or predicts.

OpenCV's decoders are the fastest that are well maintained, and they release the GIL, so that threads decode in parallel.
They read JPEG, PNG and WebP as Pillow does; rare_formats.py decodes the rest. OpenCV is imported when the first image is
decoded.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from shardstep.datasets.rare_formats import decode_rare

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
DECODER = 2  # counts the changes of the pixels that `decode` returns for a file; caches of pixels have it in their name
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_GREY_ALPHA = b"\x04"  # colour type of PNG
_LUMA = np.array([[19595, 38470, 7471]], dtype=np.float32)  # 65536 times ITU-R 601's 0.299, 0.587 and 0.114


@lru_cache(maxsize=1)
def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(0)  # we decode one image per thread
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # silent: decode() raises instead; OpenCV 4 has it in cv2 itself
    return cv2


@lru_cache
def _flag(mode: str) -> int:
    """Return the flag of imread for RGB, or else for as many channels as the file has, in OpenCV's order.

    Never IMREAD_GRAYSCALE, which computes in linear light for a PNG with an sRGB or gAMA chunk.
    """
    cv2 = _cv2()
    channels = cv2.IMREAD_COLOR_RGB if mode == "RGB" else cv2.IMREAD_ANYCOLOR
    return int(channels | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)


def decode(data: bytes, mode: str) -> np.ndarray:
    """Decode an image file to uint8, shape (height, width, channels), as it is stored.

    The first frame is read. EXIF orientation, transparency and colour profiles are dropped.

    Args:
        mode: "RGB", "L" (grey, see `to_grey`), or "UNCHANGED" for one or three channels, as in the file.

    Raises:
        ValueError: the bytes are not an image, or its channels are signed or have more than 8 bits.
    """
    if data[:8] == _PNG:  # neither animated nor grey with transparency, which OpenCV reads wrongly and as colour
        is_common = data.find(b"acTL", 0, data.find(b"IDAT")) < 0 and data[25:26] != _GREY_ALPHA
    else:
        is_common = extension_of(data) != "png"
    if not is_common:
        return _in_mode(decode_rare(data), mode)
    cv2 = _cv2()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _flag(mode))
    except cv2.error as error:  # for example, an absurd size
        raise ValueError(f"not an image that can be decoded ({error.err})") from None
    if pixels is None and mode == "RGB":  # perhaps a grey lossless JPEG
        return _in_mode(decode(data, "UNCHANGED"), mode)
    if pixels is None:
        raise ValueError("not an image that can be decoded")
    if pixels.itemsize > 1:
        raise ValueError(f"{8 * pixels.itemsize} bits per channel; only 8 are supported")
    if mode == "RGB":
        return pixels
    if pixels.ndim == 2:
        return pixels[:, :, np.newaxis]
    return _in_mode(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), mode)


def extension_of(data: bytes) -> str:
    """Return the file name extension of JPEG and WebP files by their first bytes, and png for all others."""
    if data[:3] == _JPEG:
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "png"


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Convert RGB to grey as Pillow does, uint8 (height, width, 3) -> (height, width, 1), with the weights of ITU-R 601."""
    luma = _cv2().transform(pixels.astype(np.float32), _LUMA)  # whole numbers below 2**24, so exact
    return ((luma + 32768) / 65536).astype(np.uint8)[:, :, np.newaxis]


def _in_mode(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Convert pixels (height, width, 1 or 3) to a mode of `decode`."""
    channels = pixels.shape[2]
    if mode == "RGB" and channels == 1:
        return pixels.repeat(3, axis=2)
    return to_grey(pixels) if mode == "L" and channels == 3 else pixels


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
