"""Image files outside a data set: finds them in folders, and decodes, scales and crops them like a data set's images."""

import os
from pathlib import Path

import numpy as np

from shardstep.datasets.decode import EXTENSIONS, decode, resize_to_cover

FOUND = (*EXTENSIONS, "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""File name extensions of images in a folder; a file that is given by name may have any."""


def find_image_files(path: Path) -> list[Path]:
    """Return the given file, or the image files in and below a folder, sorted; hidden files are skipped.

    Raises:
        ValueError: the file or folder does not exist, or the folder holds no image.
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
    """Read an image of any size and format. The EXIF orientation is ignored, as in a data set.

    Args:
        mode: "RGB" or "L", like the data set's images.
        image_shape: (height, width, channels) of the result: the image is scaled to cover it, and cropped to its centre.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    return resize_to_cover(decode(data, mode), image_shape[0], image_shape[1])
