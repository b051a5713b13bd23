"""Transforms that change the values of pixels: colours and sharpness."""

import torch
from torch import Tensor

from shardstep.datasets.augment.chosen import change_by_amount, change_chosen, in_parts
from shardstep.datasets.rng import Draws


def color_jitter(
    images: Tensor,
    draws: Draws,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.0,
) -> Tensor:
    """Scale brightness, contrast (around the image's mean) and saturation by random factors from [1 - x, 1 + x], then turn
    the hue by up to `hue` of the colour circle, at most 0.5, either way.

    Torchvision's ColorJitter does the four in random order, cuts off fractions after each, and scales contrast around the
    mean of the grey image.
    """
    signed = 2 * draws.uniform(columns=3).float() - 1  # (B, 3)
    factors = [
        (1 + most * signed[:, column]).view(-1, 1, 1, 1)
        for column, most in enumerate((brightness, contrast, saturation))
    ]
    for part, *of_part in in_parts(images, *factors):
        part.copy_(_scaled(part, *of_part, contrast=contrast > 0, saturation=saturation > 0))
    return _turn_hue(images, draws, hue) if hue else images


def grayscale(images: Tensor, draws: Draws, *, probability: float = 0.1) -> Tensor:
    """Replace colours by their grey value with the given probability. Equals torchvision's RandomGrayscale."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale  # here: the import takes a second

    chosen = draws.uniform()[:, 0] < probability
    channels = images.shape[3]
    return change_chosen(
        images, chosen, lambda colored: rgb_to_grayscale(colored.permute(0, 3, 1, 2), channels).permute(0, 2, 3, 1)
    )


def blur(
    images: Tensor,
    draws: Draws,
    *,
    probability: float = 0.5,
    kernel_size: int = 5,
    sigma: tuple[float, float] = (0.1, 2.0),
) -> Tensor:
    """Blur images with the given probability by a Gaussian; its standard deviation in pixels is random within `sigma`.

    `kernel_size` is an odd number of pixels; borders are reflected. Columns and rows are blurred in turn, which costs a
    fraction of torchvision's GaussianBlur in one pass, and differs by one level in at most 1 of 10,000 values.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    def blurred(chosen: Tensor, deviation: float) -> Tensor:
        values = chosen.float()
        for kernel in ([1, kernel_size], [kernel_size, 1]):
            values = gaussian_blur(values, kernel, [deviation, deviation])
        return values.round_().to(torch.uint8)

    deviations = {
        row: sigma[0] + (sigma[1] - sigma[0]) * place
        for row, (chance, place) in enumerate(draws.uniform_on_host(columns=2).tolist())
        if chance < probability
    }
    return change_by_amount(images, deviations, blurred)


def exact_mean(levels: Tensor) -> Tensor:
    """Return the mean of each image, float32 (batch, 1, 1, 1), whatever the batch, the threads and the size of images.

    `levels`: whole numbers from 0 to 255, float32 (batch, height, width, channels). float32 holds the sum of a row, but not
    that of a large image, which torch would add up in an order that depends on batch and threads.
    """
    rows = levels.sum(dim=(2, 3)).double()
    return (rows.sum(dim=1) / levels[:1].numel()).float().view(-1, 1, 1, 1)


def _scaled(
    images: Tensor, bright: Tensor, contrasted: Tensor, saturated: Tensor, *, contrast: bool, saturation: bool
) -> Tensor:
    originals = images.float()
    values = originals * bright
    if contrast:
        mean = exact_mean(originals) * bright
        values = mean + (values - mean) * contrasted
    if saturation and images.shape[3] == 3:
        red, green, blue = values.split(1, dim=3)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601, (B, H, W, 1)
        values = luma + (values - luma) * saturated
    return values.round_().clamp_(0, 255)


def _turn_hue(images: Tensor, draws: Draws, most: float) -> Tensor:
    from torchvision.transforms.v2.functional import adjust_hue

    turns = (2 * draws.uniform_on_host()[:, 0] - 1) * most
    return change_by_amount(images, dict(enumerate(turns.tolist())), adjust_hue)
