"""What a shard holds of an image: the file as it is where webdataset's readers know its format, else pixels encoded anew."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.schema import Orientation
from shardstep.datasets.decode import decode, encode_jpeg, encode_png, extension_of
from shardstep.datasets.framing import LARGEST_SIDE, Box, Crop
from shardstep.datasets.orientation import UPRIGHT, turn_of
from shardstep.datasets.scale import cut_and_scale

QUALITY = 90  # of JPEGs that are shrunk
_KEPT = ("png", "jpg", "webp", "avif")  # formats whose files are stored as they are
_LOSSY = ("jpg", "webp", "avif")  # formats of photographs, which become JPEGs when they are shrunk


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        orientation: whether they are upright, as EXIF says, or as they are stored.
        resize: pixels that the shorter side is scaled down to; None keeps the size. Smaller images are not enlarged.
        quality: of the JPEGs that are scaled, 1 to 100; None is QUALITY.
    """

    orientation: Orientation = "follow"
    resize: int | None = None
    quality: int | None = None

    def check(self) -> None:
        """Raise InputError if the options make no sense."""
        if self.quality is not None and self.resize is None:
            raise InputError(f"a quality of {self.quality} is for images that are scaled: give --resize, too")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InputError(f"a quality of {self.quality}: give 1 to 100")
        if self.resize is not None and not 1 <= self.resize <= LARGEST_SIDE:
            raise InputError(f"a shorter side of {self.resize} pixels: give 1 to {LARGEST_SIDE}")

    def made(self, have_files: bool) -> dict[str, Any]:
        """Return what a manifest says about them; without files among the images, there is no orientation to speak of."""
        scaled = {} if self.resize is None else {"resize": self.resize, "quality": self.quality or QUALITY}
        return ({"orientation": self.orientation} if have_files else {}) | scaled


@dataclass(frozen=True)
class StoredImage:
    """An image file for a shard.

    Attributes:
        extension: of its format.
        former: the extension of the format that it had, where it is another; else None.
        was_file: whether it was a file, and not pixels.
    """

    data: bytes
    extension: str
    former: str | None = None
    was_file: bool = True


def stored_image(content: bytes | np.ndarray, options: ImageOptions) -> StoredImage:
    """Return what is stored of an image file, or of pixels: uint8 (height, width, 1 or 3).

    A file that is stored as it is keeps its orientation, which whoever reads it follows; one that is encoded anew is upright.

    Raises:
        ValueError: see `decode`.
    """
    if isinstance(content, np.ndarray):
        return StoredImage(encode_png(_scaled(content, options.resize)), "png", was_file=False)
    # Also where the file is kept: it is known to be whole then.
    pixels = decode(content, "UNCHANGED", options.orientation)
    extension = extension_of(content) or "png"
    scaled = _scaled(pixels, options.resize)
    is_turned = options.resize is not None and options.orientation == "follow" and turn_of(content) != UPRIGHT
    if extension in _KEPT and scaled is pixels and not is_turned:
        return StoredImage(content, extension)
    if extension in _LOSSY:
        return StoredImage(
            encode_jpeg(scaled, options.quality or QUALITY), "jpg", None if extension == "jpg" else extension
        )
    return StoredImage(encode_png(scaled), "png", None if extension == "png" else extension)


def _scaled(pixels: np.ndarray, shorter_side: int | None) -> np.ndarray:
    """Scale pixels down until their shorter side is so long, as data.crop_version=2 does; smaller ones stay as they are."""
    height, width, _ = pixels.shape
    shorter = min(height, width)
    if shorter_side is None or shorter <= shorter_side:
        return pixels
    size = (height * shorter_side // shorter, width * shorter_side // shorter)  # cut, as in torchvision
    return cut_and_scale(pixels, Crop(Box(0, 0, height, width), size, Box(0, 0, *size)), "bilinear")
