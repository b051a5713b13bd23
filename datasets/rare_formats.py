"""Bytes of an image file of a rarer format to its pixels: Pillow decodes what OpenCV reads wrongly, or not at all.

OpenCV 5.0 swaps red and blue in AVIF with transparency, multiplies TIFF by its alpha, follows its orientation and wraps its
signed values, ignores the maximum of PGM and PPM, and reads the wrong frame of an APNG. Pillow in turn cuts deeper channels
to 8 bits and wraps signed ones without a word: such files are refused here.
"""

import io
import re
from typing import Any

import numpy as np

from shardstep.configs.schema import Orientation
from shardstep.datasets.orientation import ORIENTATION, UPRIGHT, turn_of_opened
from shardstep.datasets.pillow import pillow

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG2000", "PNG", "PPM", "TIFF")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes with 8 bits per channel
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # tags of TIFF 6.0, and a value of the latter


def decode_rare(data: bytes, orientation: Orientation) -> np.ndarray:
    """Decode the first frame: uint8, shape (height, width, 1 or 3). Transparency is dropped.

    Raises:
        ValueError: the bytes are no image in one of these formats, or its channels are signed or have more than 8 bits.
    """
    from PIL import UnidentifiedImageError

    if not data:
        raise ValueError("not an image that can be decoded: it is empty")
    try:
        with pillow().open(io.BytesIO(data), formats=_FORMATS) as image:
            problem = _unsupported_channels(image, data)
            if problem is None:
                turn = turn_of_opened(image) if orientation == "follow" else UPRIGHT
                return turn.pixels(_stored_pixels(image))
    except UnidentifiedImageError:  # its text names an object in memory
        problem = "not an image that can be decoded"
    except Exception as error:  # what Pillow raises for damaged files is of any class
        problem = f"not an image that can be decoded ({error})"
    raise ValueError(problem)


def _stored_pixels(image: Any) -> np.ndarray:
    if image.format == "TIFF":
        image.getexif()[ORIENTATION] = 1  # Pillow would turn the image
    image.load()
    image.info.pop("transparency", None)  # conversion would look for a colour that stands for it
    pixels = np.array(image.convert("L" if image.mode in _GREY else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)  # grey: (H, W) -> (H, W, 1)


def _unsupported_channels(image: Any, data: bytes) -> str | None:
    """Say what is unsupported of a file that Pillow has opened; None if its channels are unsigned with at most 8 bits."""
    bits, unsigned = _channels(image, data)
    if not unsigned:
        return "signed or floating-point channels: convert it to unsigned ones of 8 bits"
    if bits > 8:
        return f"{bits} bits per channel: convert it to 8 bits, or to a PNG that is not animated"
    if image.mode not in _GREY + _COLOUR:
        return f"pixels of the kind {image.mode}: convert it to RGB or grey"
    return None


def _channels(image: Any, data: bytes) -> tuple[int, bool]:
    """Return bits per channel of an image file, and whether its values are unsigned integers."""
    if image.format == "PNG":  # in the chunk IHDR, the first
        return data[24], True
    if image.format == "TIFF":
        formats = image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))), set(formats) == {_UNSIGNED}
    if image.format == "JPEG2000":  # in the segment SIZ: the number of components, then 3 bytes for each
        components = data.index(b"\xff\x4f\xff\x51") + 40
        end = components + 2 + 3 * int.from_bytes(data[components : components + 2], "big")
        depths = data[components + 2 : end : 3]
        return max(depth & 0x7F for depth in depths) + 1, all(depth < 0x80 for depth in depths)
    if image.format == "AVIF":  # in the box av1C: version, profile, then the bits tier, high_bitdepth, twelve_bit
        flags = data[data.index(b"av1C") + 6]
        return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10, True
    if image.format == "PPM" and image.mode == "F":
        return 32, False
    if image.format == "PPM" and image.mode != "1":  # magic, width, height, maximum, with comments between them
        header = re.sub(rb"#[^\r\n]*", b"", data[: image.tile[0].offset])
        return int(header.split()[3]).bit_length(), True
    return 8, True
