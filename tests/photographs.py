"""Pictures for tests that are smooth enough for JPEG, in every kind of JPEG file."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from shardstep.datasets.write import write_shards

JPEG_KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "grey, progressive": {"mode": "L", "progressive": True},
    "CMYK": {"mode": "CMYK"},
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random colours: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2 + height // 24, 2 + width // 24, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    """Encode with Pillow."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "jpeg", quality=90, **options)
    return stream.getvalue()


def write_photographs(folder: Path, split: str, count: int, classes: int = 2) -> Path:
    """A folder of classes with JPEGs of several sizes and kinds; returns what is above the split."""
    kinds = list(JPEG_KINDS.values())
    for number in range(count):
        path = folder / split / f"class{number % classes}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            jpeg(picture(40 + 7 * number % 60, 50 + 11 * number % 70, number), **kinds[number % len(kinds)])
        )
    return folder


def photograph_shards(folder: Path, **counts: int) -> Path:
    """Shards of JPEGs, so many of each split, and the files that they were made of, in files/."""
    for split, count in counts.items():
        write_photographs(folder / "files", split, count)
        write_shards(str(folder / "files"), split, folder / split, samples_per_shard=10)
    return folder
