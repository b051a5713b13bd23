"""How a picture is turned to be upright: what its camera noted in EXIF, applied to pixels and to crops."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardstep.datasets.framing import Box, Crop
from shardstep.datasets.pillow import pillow

ORIENTATION = 0x0112  # tag of EXIF and TIFF
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
_APP1, _SCAN = b"\xff\xe1", b"\xff\xda"  # markers of JPEG; APP1 holds EXIF or XMP
# What a PNG has EXIF or XMP in: a chunk of its own, ImageMagick's text chunk, or Adobe's.
_IN_PNG = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
_IN_WEBP = 0x08 | 0x04  # flags of the chunk VP8X for EXIF and XMP
_FLIPS = {
    (True, False): 0,
    (False, True): 1,
    (True, True): -1,
}  # OpenCV's codes, by whether rows and columns are reversed


@dataclass(frozen=True)
class Turn:
    """A turn by quarters, mirrored or not: rows and columns are exchanged first, then either is reversed."""

    exchanges: bool = False
    reverses_rows: bool = False
    reverses_columns: bool = False

    def pixels(self, stored: np.ndarray) -> np.ndarray:
        """Turn pixels upright, (height, width) or (height, width, channels), or with height and width exchanged."""
        import cv2  # a third of NumPy's time for a photograph, which would be more than that of decoding it

        turned = cv2.transpose(stored) if self.exchanges else stored
        if self.reverses_rows or self.reverses_columns:
            turned = cv2.flip(turned, _FLIPS[self.reverses_rows, self.reverses_columns])
        return turned.reshape(*turned.shape[:2], *stored.shape[2:])  # OpenCV drops the axis of a single channel

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Turn a height and width; the same turns them back."""
        return (width, height) if self.exchanges else (height, width)

    def stored_crop(self, crop: Crop, height: int, width: int) -> Crop:
        """Return the crop of the stored picture that is a crop of the upright one, of height x width, once it is turned."""
        region, window = self._stored_box(crop.region, height, width), self._stored_box(crop.window, *crop.scaled)
        return Crop(region, self.size(*crop.scaled), window)

    def _stored_box(self, box: Box, height: int, width: int) -> Box:
        top = height - box.top - box.height if self.reverses_rows else box.top
        left = width - box.left - box.width if self.reverses_columns else box.left
        return Box(left, top, box.width, box.height) if self.exchanges else Box(top, left, box.height, box.width)


UPRIGHT = Turn()
# By the values of EXIF 2.32, tag Orientation: where row 0 and column 0 of the stored picture are in the upright one.
_TURNS = {
    1: UPRIGHT,
    2: Turn(reverses_columns=True),
    3: Turn(reverses_rows=True, reverses_columns=True),
    4: Turn(reverses_rows=True),
    5: Turn(exchanges=True),
    6: Turn(exchanges=True, reverses_columns=True),
    7: Turn(exchanges=True, reverses_rows=True, reverses_columns=True),
    8: Turn(exchanges=True, reverses_rows=True),
}


def turn_of(data: bytes) -> Turn:
    """Return the turn that makes an image file upright; none where it has no orientation, or a damaged one."""
    if not _may_say(data):
        return UPRIGHT
    try:
        with pillow().open(io.BytesIO(data), formats=_FORMATS) as image:
            return turn_of_opened(image)
    except (
        Exception
    ):  # what Pillow raises for damaged files is of any class; whether it can be decoded is not asked here
        return UPRIGHT


def turn_of_opened(image: Any) -> Turn:
    """Return the turn of an image that Pillow has opened."""
    try:
        return _TURNS.get(image.getexif().get(ORIENTATION, 1), UPRIGHT)
    except Exception:  # as above
        return UPRIGHT


def _may_say(data: bytes) -> bool:
    """Check whether a file may have EXIF or XMP at all; opening each with Pillow would take 70 microseconds."""
    if data[:2] == b"\xff\xd8":
        place = 2
        while (marker := data[place : place + 2])[:1] == b"\xff" and marker not in (_APP1, _SCAN):
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        return marker != _SCAN
    if data[:4] == b"RIFF":
        return data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & _IN_WEBP)
    if data[:2] in (b"II", b"MM") or data[4:8] == b"ftyp":  # TIFF, AVIF
        return True
    return any(mark in data for mark in _IN_PNG)
