"""Batch transforms on uint8 pixels, on the device of the batch.

Each takes images of shape (batch, height, width, channels) and Draws, and returns images of the same shape, except for
`shrink`; it may change its input. The result for a sample depends on (seed, epoch, its global position or its id), never
on its batch or rank. Keyword arguments are options in a recipe: `data.augment=[flip, {name: translate, pixels: 2}]`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardstep.datasets.rng import Draws

Transform = Callable[[Tensor, Draws], Tensor]


def flip(images: Tensor, draws: Draws, *, probability: float = 0.5) -> Tensor:
    """Mirror images horizontally with the given probability."""
    return _mirror(images, draws.uniform()[:, 0] < probability)


def alternating_flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror a random half of the images in even epochs, and the other half in odd epochs.

    Any two consecutive epochs contain every image both ways. Jordan 2024, arXiv 2404.00498, section 3.6.
    """
    return _mirror(images, (draws.uniform_by_sample()[:, 0] < 0.5) ^ bool(draws.epoch % 2))


def translate(images: Tensor, draws: Draws, *, pixels: int = 4) -> Tensor:
    """Shift images by up to `pixels` in each direction, with reflect padding."""
    batch_size, height, width, channels = images.shape
    shift = draws.integers(2 * pixels + 1, columns=2)
    padded = _reflect_pad(images, pixels)
    # A window is one run of bytes, with the padding of its rows in between: in an overlapping view whose rows are all
    # possible runs, index_select copies each image's run at memory speed.
    per_image, per_row, per_pixel, _ = padded.stride()
    run = height * per_row
    runs = padded.as_strided((padded.untyped_storage().nbytes() - run + 1, run), (1, 1))
    starts = torch.arange(batch_size, device=images.device) * per_image
    starts += shift[:, 0] * per_row + shift[:, 1] * per_pixel
    windows = runs.index_select(0, starts).view(batch_size, height, width + 2 * pixels, channels)
    return windows[:, :, :width].contiguous()


def cutout(images: Tensor, draws: Draws, *, size: int = 8) -> Tensor:
    """Blacken a square of side `size` around a random pixel, clipped at the edges. DeVries 2017, arXiv 1708.04552."""
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device) - draws.integers(height) + size // 2  # (B, H)
    columns = torch.arange(width, device=images.device) - draws.integers(width) + size // 2  # (B, W)
    inside = ((rows >= 0) & (rows < size)).unsqueeze(2) & ((columns >= 0) & (columns < size)).unsqueeze(1)  # (B, H, W)
    return images.masked_fill(inside.unsqueeze(3), 0)


def shrink(images: Tensor, draws: Draws, *, size: int, epochs: int) -> Tensor:
    """Scale images to `size` x `size` pixels in the first `epochs` epochs, which then take a fraction of the time.

    Bilinear with antialiasing. Put it last: transforms after it would work on fewer pixels. Images that are already as
    small stay as they are, so that several of these transforms, the smallest size first, raise the size during training,
    as in Howard 2018 and Page 2018.
    """
    if draws.epoch >= epochs or images.shape[1] * images.shape[2] <= size**2:
        return images
    values = images.permute(0, 3, 1, 2)
    if images.device.type != "cpu":  # torch interpolates uint8 only on CPUs
        values = values.float()
    small = functional.interpolate(values, (size, size), mode="bilinear", antialias=True)
    if small.dtype != torch.uint8:
        small = small.round_().clamp_(0, 255).to(torch.uint8)
    return small.permute(0, 2, 3, 1).contiguous()


def color_jitter(
    images: Tensor, draws: Draws, *, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2
) -> Tensor:
    """Scale brightness, contrast (around the image's mean) and saturation by random factors from [1 - x, 1 + x]."""
    signed = 2 * draws.uniform(columns=3).float() - 1  # (B, 3)
    bright, contrasted, saturated = (
        (1 + most * signed[:, column]).view(-1, 1, 1, 1)
        for column, most in enumerate((brightness, contrast, saturation))
    )
    values = images.float() * bright
    if contrast:
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        values = mean + (values - mean) * contrasted
    if saturation and images.shape[3] == 3:
        red, green, blue = values.split(1, dim=3)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601, (B, H, W, 1)
        values = luma + (values - luma) * saturated
    return values.round_().clamp_(0, 255).to(torch.uint8)


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (flip, alternating_flip, translate, cutout, shrink, color_jitter)
}


def build_transforms(sections: Sequence[dict[str, Any]]) -> list[Transform]:
    """Build the transforms of a recipe's checked data.augment."""
    return [
        partial(TRANSFORMS[section["name"]], **{key: section[key] for key in section if key != "name"})
        for section in sections
    ]


def smallest_side(section: dict[str, Any]) -> int:
    """Return the smallest height and width in pixels that a transform accepts."""
    if section["name"] == "translate":
        return int(section["pixels"]) + 1
    return int(section["size"]) if section["name"] == "shrink" else 1


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    if images.device.type != "cpu":
        return torch.where(chosen.view(-1, 1, 1, 1), images.flip(2), images)
    # A CPU is faster if it touches only the chosen images; on a GPU that would need a sync, to learn how many there are.
    rows = chosen.nonzero()[:, 0]
    # NumPy writes an image back as one run of bytes, torch's index_copy_ byte by byte: 0.05 ms, not 1.8, for 256 of 32x32.
    images.numpy()[rows.numpy()] = images.index_select(0, rows).flip(2).numpy()
    return images


def _reflect_pad(images: Tensor, pad: int) -> Tensor:
    batch_size, height, width, channels = images.shape
    # One extra image: the last window's run of bytes ends past the last image.
    padded = images.new_empty(batch_size + 1, height + 2 * pad, width + 2 * pad, channels)[:batch_size]
    padded[:, pad : pad + height, pad : pad + width] = images
    inner = padded[:, pad : pad + height]
    for distance in range(1, pad + 1):  # columns first, then rows with the corners
        inner[:, :, pad - distance] = inner[:, :, pad + distance]
        inner[:, :, pad + width - 1 + distance] = inner[:, :, pad + width - 1 - distance]
    for distance in range(1, pad + 1):
        padded[:, pad - distance] = padded[:, pad + distance]
        padded[:, pad + height - 1 + distance] = padded[:, pad + height - 1 - distance]
    return padded


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
        values = (images.permute(0, 2, 3, 1).flatten(1) - self._shift) / self._scale
        return values.round().clamp(0, 255).to(torch.uint8).view(images.permute(0, 2, 3, 1).shape)
