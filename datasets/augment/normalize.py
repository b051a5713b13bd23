"""Normalisation: uint8 pixels in, float32 images out, as networks take them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 (channels,): pixels (0 to 255) * scale + shift = (pixels / 255 - mean) / std."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    return scale, -torch.tensor(mean, dtype=torch.float64) * 255 * scale


class Normalize:
    """Normalisation of uint8 pixels (batch, height, width, channels): (value / 255 - mean) / std, as a (B, C, H, W) view.

    The view has the strides of torch.channels_last. The batch is converted in parts that fit a core's cache: the work is
    bound by memory, and the entire batch in float32 would cross it three times.
    """

    _PART_BYTES = 1 << 20

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], image_shape: tuple[int, int, int], device: torch.device
    ):
        """`mean`, `std`: per channel on the 0..1 scale; `image_shape`: (height, width, channels)."""
        scale, shift = scale_and_shift(mean, std)
        # One value per pixel and channel: an inner loop over 3 channels would not be vectorised.
        pixels = image_shape[0] * image_shape[1]
        self._scale = scale.float().repeat(pixels).to(device)
        self._shift = shift.float().repeat(pixels).to(device)
        self._part = max(1, self._PART_BYTES // (4 * len(self._scale))) if device.type == "cpu" else None

    def __call__(self, images: Tensor) -> Tensor:
        values = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        part = self._part or max(len(images), 1)
        numbers = math.prod(images.shape[1:])  # fewer than self._scale has, if the images were shrunk
        scale, shift = self._scale[:numbers], self._shift[:numbers]
        for target, source in zip(values.flatten(1).split(part), images.flatten(1).split(part), strict=True):
            target.copy_(source)  # a separate conversion: addcmul on two types would make a copy first
            torch.addcmul(shift, target, scale, out=target)
        return values.permute(0, 3, 1, 2)

    def undo(self, images: Tensor) -> Tensor:
        """Convert normalised images (B, C, H, W) back to uint8 pixels (B, H, W, C), clamped to 0..255."""
        rows = images.permute(0, 2, 3, 1)
        numbers = math.prod(rows.shape[1:])  # as above
        values = (rows.flatten(1) - self._shift[:numbers]) / self._scale[:numbers]
        return values.round().clamp(0, 255).to(torch.uint8).view(rows.shape)
