"""Transforms that hide a part of each image."""

import math
from typing import Literal

import torch
from torch import Tensor

from shardstep.datasets.rng import Draws

_ATTEMPTS = 10  # torchvision's, to find a box that fits


def cutout(images: Tensor, draws: Draws, *, size: int = 8) -> Tensor:
    """Blacken a square of side `size` around a random pixel, clipped at the edges. DeVries 2017, arXiv 1708.04552."""
    _, height, width, _ = images.shape
    top, left = draws.integers(height)[:, 0] - size // 2, draws.integers(width)[:, 0] - size // 2
    return images.masked_fill(inside_box(images, top, left, top + size, left + size), 0)


def erasing(
    images: Tensor,
    draws: Draws,
    *,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    fill: Literal["black", "noise"] = "black",
) -> Tensor:
    """Fill a random box inside each image with black or noise, with the given probability. Zhong 2017, arXiv 1708.04896.

    `scale` is the range of the box's share of the image's area, `ratio` that of its height / width, uniform in the
    logarithm. As torchvision's RandomErasing before normalisation: of ten random boxes the first that is smaller than the
    image, if any is. Noise is uniform, where torchvision's and timm's, after normalisation, is Gaussian.
    """
    _, height, width, _ = images.shape
    chosen = draws.uniform()[:, 0] < probability
    areas = height * width * _between(*scale, draws.uniform(_ATTEMPTS))  # (B, attempts)
    ratios = _between(math.log(ratio[0]), math.log(ratio[1]), draws.uniform(_ATTEMPTS)).exp()
    heights, widths = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(dim=1, keepdim=True)  # of equal values argmax returns the first
    box_height, box_width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    place = draws.uniform(columns=2)
    top, left = (place[:, 0] * (height - box_height + 1)).long(), (place[:, 1] * (width - box_width + 1)).long()
    inside = inside_box(images, top, left, top + box_height, left + box_width)
    inside &= (chosen & fits.any(dim=1)).view(-1, 1, 1, 1)
    if fill == "noise":
        return torch.where(inside, draws.bytes(images[:1].numel()).reshape(images.shape), images)
    return images.masked_fill(inside, 0)


def inside_box(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Return which pixels of images (batch, height, width, channels) are in rows [top, bottom) and columns [left, right).

    One box per image, each edge int64 (batch,), perhaps outside the image. Returns bool (batch, height, width, 1).
    """
    _, height, width, _ = images.shape
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows = (row >= top.unsqueeze(1)) & (row < bottom.unsqueeze(1))  # (B, H)
    columns = (column >= left.unsqueeze(1)) & (column < right.unsqueeze(1))  # (B, W)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(3)


def _between(least: float, most: float, uniform: Tensor) -> Tensor:
    return least + (most - least) * uniform
