"""Image files anywhere to pixels of one shape: found in folders, decoded, scaled and cropped as a data set's images are."""

import os
from pathlib import Path

import numpy as np

from shardstep.datasets.decode import EXTENSIONS, decode, resize_to_cover

FOUND = (*EXTENSIONS, "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""File name extensions that count as images in a folder; a file that is named itself may have any."""


def find_image_files(path: Path) -> list[Path]:
    """A file itself, or the image files in a folder and those below it, by name; hidden ones are left out.

    Raises:
        ValueError: there is no such file or folder, or the folder holds no image.
    """
    if not path.is_dir():
        if not path.exists():
            raise ValueError("does not exist")
        return [path]
    found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names if not name.startswith(".")]
    images = sorted(file for file in found if file.suffix.lstrip(".").lower() in FOUND)
    if not images:
        raise ValueError(f"holds no image: no file that ends in {', '.join(FOUND)}")
    return images


def read_image_file(path: Path, mode: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Read an image of any size and kind.

    Args:
        path: of the file.
        mode: "RGB" or "L", as the data set has its images.
        image_shape: (height, width, channels): it is scaled until it covers that, and its centre is cut out.

    Returns:
        uint8, of that shape. An orientation mark of a camera is not followed, as in a data set.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    return resize_to_cover(decode(data, mode), image_shape[0], image_shape[1])
