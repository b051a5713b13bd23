"""Transforms that move pixels: mirror, shift, rotate, scale."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from shardstep.datasets.augment.chosen import change_by_amount, change_chosen
from shardstep.datasets.rng import Draws


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
    return _random_windows(_reflect_pad(images, pixels), images.shape, draws)


def random_crop(
    images: Tensor, draws: Draws, *, padding: int = 4, padding_mode: Literal["constant", "reflect"] = "constant"
) -> Tensor:
    """Pad images by `padding` pixels on each side and cut out a random window of their size.

    constant pads with black. This is torchvision's RandomCrop of the images' own size; reflect is what translate does.
    """
    pad = _reflect_pad if padding_mode == "reflect" else _black_pad
    return _random_windows(pad(images, padding), images.shape, draws)


def rotate(images: Tensor, draws: Draws, *, degrees: float = 15.0) -> Tensor:
    """Rotate images around their centre by a random angle of up to `degrees` either way; black fills the corners.

    Each pixel is the nearest one of the original, as in torchvision's RandomRotation.
    """
    from torchvision.transforms.v2 import functional as torchvision  # here: the import takes a second

    angles = (2 * draws.uniform_on_host()[:, 0] - 1) * degrees
    return change_by_amount(images, dict(enumerate(angles.tolist())), torchvision.rotate)


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


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    return change_chosen(images, chosen, lambda originals: originals.flip(2))


def _random_windows(padded: Tensor, shape: torch.Size, draws: Draws) -> Tensor:
    """Cut a random window of `shape` (batch, height, width, channels) out of each image of _empty_pad."""
    batch_size, height, width, channels = shape
    shift = draws.integers(padded.shape[1] - height + 1, columns=2)
    # A window is one run of bytes, with the padding of its rows in between: in an overlapping view whose rows are all
    # possible runs, index_select copies each image's run at memory speed.
    per_image, per_row, per_pixel, _ = padded.stride()
    run = height * per_row
    runs = padded.as_strided((padded.untyped_storage().nbytes() - run + 1, run), (1, 1))
    starts = torch.arange(batch_size, device=padded.device) * per_image
    starts += shift[:, 0] * per_row + shift[:, 1] * per_pixel
    windows = runs.index_select(0, starts).view(batch_size, height, padded.shape[2], channels)
    return windows[:, :, :width].contiguous()


def _empty_pad(images: Tensor, pad: int) -> Tensor:
    """Return images with room for `pad` pixels on each side, which are still to be written."""
    batch_size, height, width, channels = images.shape
    # One extra image: the last window's run of bytes ends past the last image.
    padded = images.new_empty(batch_size + 1, height + 2 * pad, width + 2 * pad, channels)[:batch_size]
    padded[:, pad : pad + height, pad : pad + width] = images
    return padded


def _black_pad(images: Tensor, pad: int) -> Tensor:
    padded = _empty_pad(images, pad)
    if pad:
        for border in (padded[:, :pad], padded[:, -pad:], padded[:, :, :pad], padded[:, :, -pad:]):
            border.zero_()
    return padded


def _reflect_pad(images: Tensor, pad: int) -> Tensor:
    _, height, width, _ = images.shape
    padded = _empty_pad(images, pad)
    inner = padded[:, pad : pad + height]
    for distance in range(1, pad + 1):  # columns first, then rows with the corners
        inner[:, :, pad - distance] = inner[:, :, pad + distance]
        inner[:, :, pad + width - 1 + distance] = inner[:, :, pad + width - 1 - distance]
    for distance in range(1, pad + 1):
        padded[:, pad - distance] = padded[:, pad + distance]
        padded[:, pad + height - 1 + distance] = padded[:, pad + height - 1 - distance]
    return padded
