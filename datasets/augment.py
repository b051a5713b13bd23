"""Batch transforms on uint8 pixels, on the device that the batch is on.

Each takes images of shape (batch, height, width, channels) and Draws, and returns such images, of the same size but for
`shrink`; the images it was given may be changed.
What happens to a sample depends on (seed, epoch, its global position or its id), never on the batch or rank it is in. Keyword
arguments are the transform's options in a recipe: `data.augment=[flip, {name: translate, pixels: 2}]`.
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
    """Mirror left and right with the given probability."""
    return _mirror(images, draws.uniform()[:, 0] < probability)


def alternating_flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror a random half of the images in the even epochs, and the other half in the odd ones.

    Any two epochs in a row hold every image both ways. Jordan 2024, arXiv 2404.00498, section 3.6.
    """
    return _mirror(images, (draws.uniform_by_sample()[:, 0] < 0.5) ^ bool(draws.epoch % 2))


def translate(images: Tensor, draws: Draws, *, pixels: int = 4) -> Tensor:
    """Shift by up to `pixels` in each direction; what comes in at the edges is mirrored (reflect padding)."""
    batch_size, height, width, channels = images.shape
    shift = draws.integers(2 * pixels + 1, columns=2)
    padded = _reflect_pad(images, pixels)
    # From its first pixel on, a window is one run of bytes, with the padding of its rows in between: an overlapping
    # view whose rows are all possible runs lets index_select copy each image's run at memory speed.
    per_image, per_row, per_pixel, _ = padded.stride()
    run = height * per_row
    runs = padded.as_strided((padded.untyped_storage().nbytes() - run + 1, run), (1, 1))
    starts = (
        torch.arange(batch_size, device=images.device) * per_image + shift[:, 0] * per_row + shift[:, 1] * per_pixel
    )
    return (
        runs.index_select(0, starts).view(batch_size, height, width + 2 * pixels, channels)[:, :, :width].contiguous()
    )


def cutout(images: Tensor, draws: Draws, *, size: int = 8) -> Tensor:
    """Blacken a square of side `size` around a random pixel, cut off at the edges. DeVries 2017, arXiv 1708.04552."""
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device) - draws.integers(height) + size // 2  # (B, H)
    columns = torch.arange(width, device=images.device) - draws.integers(width) + size // 2  # (B, W)
    inside = ((rows >= 0) & (rows < size)).unsqueeze(2) & ((columns >= 0) & (columns < size)).unsqueeze(1)  # (B, H, W)
    return images.masked_fill(inside.unsqueeze(3), 0)


def shrink(images: Tensor, draws: Draws, *, size: int, epochs: int) -> Tensor:
    """Scale images to `size` x `size` pixels in the first `epochs` epochs, which then take a fraction of the time.

    Bilinear with antialiasing. Put it last: what comes behind would work on fewer pixels. Images that are as small already
    stay as they are, so that several of it, the smallest first, raise the size as training goes on, as Howard 2018 and Page
    2018 do.
    """
    if draws.epoch >= epochs or images.shape[1] * images.shape[2] <= size**2:
        return images
    values = images.permute(0, 3, 1, 2)
    if images.device.type != "cpu":  # torch interpolates bytes on CPUs only
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
    "flip": flip,
    "alternating_flip": alternating_flip,
    "translate": translate,
    "cutout": cutout,
    "shrink": shrink,
    "color_jitter": color_jitter,
}


def build_transforms(sections: Sequence[dict[str, Any]]) -> list[Transform]:
    """The transforms that a recipe's checked data.augment lists."""
    return [
        partial(TRANSFORMS[section["name"]], **{key: section[key] for key in section if key != "name"})
        for section in sections
    ]


def smallest_side(section: dict[str, Any]) -> int:
    """The smallest height and width in pixels that a transform can work on."""
    if section["name"] == "translate":
        return int(section["pixels"]) + 1
    return int(section["size"]) if section["name"] == "shrink" else 1


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    if images.device.type != "cpu":
        return torch.where(chosen.view(-1, 1, 1, 1), images.flip(2), images)
    # A CPU is faster when it touches the chosen images only; on a GPU the host would have to wait for their number.
    rows = chosen.nonzero()[:, 0]
    # NumPy writes an image back as one run of bytes, torch's index_copy_ byte by byte: 0.05 and 1.8 ms for 256 of 32x32.
    images.numpy()[rows.numpy()] = images.index_select(0, rows).flip(2).numpy()
    return images


def _reflect_pad(images: Tensor, pad: int) -> Tensor:
    batch_size, height, width, channels = images.shape
    # One image more than needed: the last window's run of bytes ends past the last image.
    padded = images.new_empty(batch_size + 1, height + 2 * pad, width + 2 * pad, channels)[:batch_size]
    padded[:, pad : pad + height, pad : pad + width] = images
    inner = padded[:, pad : pad + height]
    for distance in range(1, pad + 1):  # columns first, then whole rows, corners included
        inner[:, :, pad - distance] = inner[:, :, pad + distance]
        inner[:, :, pad + width - 1 + distance] = inner[:, :, pad + width - 1 - distance]
    for distance in range(1, pad + 1):
        padded[:, pad - distance] = padded[:, pad + distance]
        padded[:, pad + height - 1 + distance] = padded[:, pad + height - 1 - distance]
    return padded


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """float64 (channels,) each: pixels from 0 to 255 times the scale plus the shift are (pixels / 255 - mean) / std."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    return scale, -torch.tensor(mean, dtype=torch.float64) * 255 * scale


class Normalize:
    """uint8 pixels (batch, height, width, channels) to (value / 255 - mean) / std, as a (B, C, H, W) view of them.

    The view has the strides of torch.channels_last. Work goes in parts that fit a core's cache: the conversion is bound
    by memory, and a whole batch in float32 would travel three times.
    """

    _PART_BYTES = 1 << 20

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], image_shape: tuple[int, int, int], device: torch.device
    ):
        """`mean`, `std`: per channel on the 0..1 scale; `image_shape`: (height, width, channels)."""
        scale, shift = scale_and_shift(mean, std)
        # One number per value of an image: an inner loop over 3 channels would not be vectorised.
        pixels = image_shape[0] * image_shape[1]
        self._scale = scale.float().repeat(pixels).to(device)
        self._shift = shift.float().repeat(pixels).to(device)
        self._part = max(1, self._PART_BYTES // (4 * len(self._scale))) if device.type == "cpu" else None

    def __call__(self, images: Tensor) -> Tensor:
        values = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        part = self._part or max(len(images), 1)
        numbers = math.prod(images.shape[1:])  # fewer than prepared for, if the images were shrunk
        scale, shift = self._scale[:numbers], self._shift[:numbers]
        for target, source in zip(values.flatten(1).split(part), images.flatten(1).split(part), strict=True):
            target.copy_(source)  # a conversion of its own: addcmul on two types would make a copy first
            torch.addcmul(shift, target, scale, out=target)
        return values.permute(0, 3, 1, 2)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) back to uint8 pixels (B, H, W, C), cut at 0 and 255."""
        values = (images.permute(0, 2, 3, 1).flatten(1) - self._shift) / self._scale
        return values.round().clamp(0, 255).to(torch.uint8).view(images.permute(0, 2, 3, 1).shape)
