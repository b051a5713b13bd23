"""Darken each image by an amount of its own."""

import torch
from torch import Tensor

from shardstep.datasets.rng import Draws


def fade(images: Tensor, draws: Draws, *, least: float = 0.5) -> Tensor:
    factor = least + (1 - least) * draws.uniform()  # (B, 1)
    return (images * factor[:, :, None, None]).to(torch.uint8)  # (B, H, W, C)
