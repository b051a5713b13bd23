"""Images with captions to one picture file."""

import math
import warnings
from pathlib import Path

import numpy as np

from shardstep.trainer.monitoring.pictures import pyplot

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg", "webp")
_MOST_COLUMNS = 8
_CELL_INCHES = 1.55


def draw_picture_grid(images: list[tuple[np.ndarray, str]], picture: Path) -> None:
    """Draw images (H, W, C) uint8 in rows, each below its caption; the name of the picture says which format it has.

    Raises:
        OSError: it cannot be written.
    """
    plt = pyplot()
    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(len(images))))
    rows = -(-len(images) // columns)
    size = (max(2, columns) * _CELL_INCHES, rows * _CELL_INCHES * 1.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, caption) in zip(axes.flat, images, strict=False):
        axis.imshow(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=8, parse_math=False)  # a $ in a name is no formula
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        figure.savefig(picture, dpi=150)
    plt.close(figure)
