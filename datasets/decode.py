"""Bytes of an image file to an array of pixels, and back: the one decoder, for whatever checks, trains or predicts.

OpenCV's decoders are the fastest that are well maintained, and they release the GIL, so that threads decode in parallel.
They read JPEG, PNG and WebP as Pillow does; rare_formats.py decodes the rest, and orientation.py knows how a picture is
turned. OpenCV is imported when the first image is decoded.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from shardstep.configs.schema import Orientation
from shardstep.datasets.orientation import turn_of
from shardstep.datasets.rare_formats import decode_rare

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
"""Extensions of the images that data sets have always held."""
RARE_EXTENSIONS = ("avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2")
"""Extensions of other images that are read."""
DECODER = 2  # counts the changes of the pixels that `decode` returns for a file; caches of pixels have it in their name
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_STARTS = {
    _JPEG: "jpg", _PNG: "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif", b"II+\0": "tif",
    b"MM\0+": "tif", b"\0\0\0\x0cjP  ": "jp2", b"\xff\x4f\xff\x51": "jp2",
    **dict.fromkeys((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), "pnm"),
}  # fmt: skip
_OF_OPENCV = ("jpg", "webp")
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


def decode(data: bytes, mode: str, orientation: Orientation = "ignore") -> np.ndarray:
    """Decode an image file to uint8, shape (height, width, channels).

    The first frame is read. Transparency and colour profiles are dropped, 16 bits of a PNG are scaled to 8.

    Args:
        mode: "RGB", "L" (grey, see `to_grey`), or "UNCHANGED" for one or three channels, as in the file.
        orientation: whether the picture is turned upright, as EXIF says, or read as it is stored.

    Raises:
        ValueError: the bytes are not an image, or its channels are signed or have more than 8 bits, in a PNG 16.
    """
    is_png = data[:8] == _PNG
    # Of an animated PNG, OpenCV reads the wrong frame.
    is_rare = data.find(b"acTL", 0, data.find(b"IDAT")) >= 0 if is_png else extension_of(data) not in _OF_OPENCV
    if is_rare:
        return _in_mode(decode_rare(data, orientation), mode)
    cv2 = _cv2()
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _flag(mode))
    except cv2.error as error:  # for example, an absurd size
        raise ValueError(f"not an image that can be decoded ({error.err})") from None
    if pixels is None and mode == "RGB":  # perhaps a grey lossless JPEG
        return _in_mode(decode(data, "UNCHANGED", orientation), mode)
    if pixels is None:
        raise ValueError("not an image that can be decoded")
    if pixels.itemsize > 1:  # a PNG of 16 bits: 65535 is 255 * 257
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if orientation == "follow":
        pixels = turn_of(data).pixels(pixels)
    if mode == "RGB":
        return pixels
    if pixels.ndim == 2:
        return pixels[:, :, np.newaxis]
    if is_png and data[25:26] == _GREY_ALPHA:  # which OpenCV reads as colour
        return pixels[:, :, :1].copy()
    return _in_mode(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), mode)


def extension_of(data: bytes) -> str | None:
    """Return the usual file name extension of an image file by its first bytes; None for what is no image that is known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and (b"avif" in data[8:64] or b"avis" in data[8:64]):
        return "avif"
    return next((extension for start, extension in _STARTS.items() if data.startswith(start)), None)


def problem_of_start(start: bytes) -> str | None:
    """Say why a file that begins so (64 bytes, or all) is surely refused by `decode`; None where only decoding tells."""
    if not start:
        return "not an image that can be decoded: it is empty"
    return "not an image that can be decoded" if extension_of(start) is None else None


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


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encode uint8 pixels of shape (height, width, 1 or 3) as JPEG, with a quality of 1 to 100."""
    cv2 = _cv2()
    stored = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else pixels
    written, data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, quality])
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
