"""Image files outside a data set: finds them in folders, and decodes, scales and crops them like a data set's images."""

from pathlib import Path

import numpy as np

from shardstep.datasets.decode import EXTENSIONS
from shardstep.datasets.decode_crop import decode_crop
from shardstep.datasets.framing import Framing
from shardstep.datasets.input_files import FolderTree, find_images, read_file

FOUND = (*EXTENSIONS, "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""File name extensions of images in a folder; a file that is given by name may have any."""


def find_image_files(path: Path) -> tuple[list[Path], str | None]:
    """Return the given file, or the image files in and below a folder, sorted; and a line on what was left out there.

    Raises:
        ValueError: the file or folder does not exist, a folder cannot be listed, or it holds no image.
    """
    if not path.is_dir():
        if not path.exists():
            raise ValueError("does not exist")
        return [path], None
    found = find_images(FolderTree(path), extensions=FOUND)
    line = found.left_out.line(path, ", ".join(FOUND))
    if not found.images:
        raise ValueError(f"holds no image: no file that ends in {', '.join(FOUND)}{f'; {line}' if line else ''}")
    return [path / image for image in found.images], line


def read_image_file(path: Path, mode: str, framing: Framing) -> np.ndarray:
    """Read an image of any size and format. The EXIF orientation is ignored, as in a data set.

    Args:
        mode: "RGB" or "L", like the data set's images.
        framing: how the image is cut and scaled; its centre is read.

    Raises:
        ValueError: the file cannot be read.
    """
    return decode_crop(read_file(path), mode, framing)
