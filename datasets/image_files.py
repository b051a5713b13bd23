"""Image files outside a data set: finds them in folders, and decodes, scales and crops them like a data set's images."""

from pathlib import Path

import numpy as np

from shardstep.configs.schema import Orientation
from shardstep.datasets.decode_crop import decode_crop
from shardstep.datasets.framing import Framing
from shardstep.datasets.input_files import IMAGE_EXTENSIONS, FolderTree, files_that_end_in, find_images, read_file


def find_image_files(path: Path) -> tuple[list[Path], str | None]:
    """Return the given file, whatever its name, or the images in and below a folder, sorted; and a line on what is left out.

    Raises:
        ValueError: the file or folder does not exist, a folder cannot be listed, or it holds no image.
    """
    if not path.is_dir():
        if not path.exists():
            raise ValueError("does not exist")
        return [path], None
    found = find_images(FolderTree(path))
    line = found.left_out.line(path)
    if not found.images:
        raise ValueError(
            f"holds no image: {line}" if line else f"holds no image: no {files_that_end_in(IMAGE_EXTENSIONS)}"
        )
    return [path / image for image in found.images], line


def read_image_file(path: Path, mode: str, framing: Framing, orientation: Orientation) -> np.ndarray:
    """Read an image of any size and format, as from a data set.

    Args:
        mode: "RGB" or "L", like the data set's images.
        framing: how the image is cut and scaled; its centre is read.
        orientation: that of the data set, see Manifest.

    Raises:
        ValueError: the file cannot be read.
    """
    return decode_crop(read_file(path), mode, framing, orientation=orientation)
