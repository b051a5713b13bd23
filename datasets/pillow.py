"""Pillow, imported when the first file needs it: as patient with large pictures as OpenCV, and silent."""

import warnings
from functools import lru_cache
from typing import Any

_MOST_PIXELS = 2**30  # as in OpenCV


@lru_cache(maxsize=1)
def pillow() -> Any:
    """Return the module PIL.Image."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # Pillow refuses twice as many
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata; what cannot be decoded is refused
    return Image
