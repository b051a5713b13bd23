"""RandAugment and TrivialAugment: random operations of random strength, each as torchvision does it.

Images that drew the same operation and strength are changed together, by torchvision.transforms.v2.functional on uint8
tensors. What they drew is known on the host, so that nothing waits for a GPU.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from shardstep.datasets.augment.chosen import change_by_amount
from shardstep.datasets.augment.color import exact_mean
from shardstep.datasets.rng import Draws

STRENGTHS = 31  # torchvision's num_magnitude_bins
WIDE = {
    "identity": 0.0, "shear_x": 0.99, "shear_y": 0.99, "translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0,
    "brightness": 0.99, "color": 0.99, "contrast": 0.99, "sharpness": 0.99, "posterize": 6.0, "solarize": 255.0,
    "autocontrast": 0.0, "equalize": 0.0,
}  # fmt: skip
"""TrivialAugment's operations and their largest magnitudes: a tangent, pixels, degrees, a factor - 1, bits, brightness."""
_SIGNED = {*WIDE} - {"identity", "posterize", "solarize", "autocontrast", "equalize"}


def randaugment(images: Tensor, draws: Draws, *, num_ops: int = 2, magnitude: int = 9) -> Tensor:
    """Apply `num_ops` random operations of strength `magnitude`, 0 to 30, in turn. Cubuk 2019, arXiv 1909.13719.

    As torchvision's RandAugment: pixels are the nearest ones of the original, or black.
    """
    _, height, width, _ = images.shape
    strengths = torch.full((len(images),), magnitude)
    for _ in range(num_ops):
        operations, signs = draws.uniform_on_host(columns=2).unbind(1)
        images = _apply(images, rand_magnitudes(height, width), operations, strengths, signs)
    return images


def trivial_augment(images: Tensor, draws: Draws) -> Tensor:
    """Apply one random operation of random strength. Mueller 2021, arXiv 2103.10158.

    As torchvision's TrivialAugmentWide: pixels are the nearest ones of the original, or black.
    """
    operations, strengths, signs = draws.uniform_on_host(columns=3).unbind(1)
    return _apply(images, WIDE, operations, (strengths * STRENGTHS).long(), signs)


def rand_magnitudes(height: int, width: int) -> dict[str, float]:
    """Return RandAugment's operations and their largest magnitudes, for images of this size in pixels."""
    factors = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.9)
    shifts = {"translate_x": 150 / 331 * width, "translate_y": 150 / 331 * height}
    return WIDE | factors | shifts | {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0, "posterize": 4.0}


def magnitude_of(operation: str, largest: float, strength: int) -> float:
    """Return the magnitude of an operation at a strength from 0 to 30, in torchvision's arithmetic."""
    if operation == "posterize":  # bits that are kept
        return (8 - torch.arange(STRENGTHS) / ((STRENGTHS - 1) / largest)).round()[strength].item()
    if operation == "solarize":  # pixels from here on are inverted
        return largest * torch.linspace(1.0, 0.0, STRENGTHS)[strength].item()
    return torch.linspace(0.0, largest, STRENGTHS)[strength].item()


def _apply(
    images: Tensor, largest: Mapping[str, float], operations: Tensor, strengths: Tensor, signs: Tensor
) -> Tensor:
    """Apply to each image its operation, of those in `largest`, at its strength; all (batch,), on the host.

    `operations` and `signs` are uniform in [0, 1).
    """
    names = [*largest]
    magnitudes: dict[str, dict[int, float]] = defaultdict(dict)
    drawn = zip((operations * len(names)).long().tolist(), strengths.tolist(), (signs < 0.5).tolist(), strict=True)
    for row, (place, strength, negative) in enumerate(drawn):
        name = names[place]
        magnitude = magnitude_of(name, largest[name], strength)
        magnitudes[name][row] = -magnitude if negative and name in _SIGNED else magnitude
    for name, amounts in magnitudes.items():
        if name != "identity":
            images = change_by_amount(images, amounts, operations_by_name()[name])
    return images


@cache
def operations_by_name() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """Return the operations by name: images (batch, channels, height, width) and a magnitude in, images out."""
    from torchvision.transforms.v2 import functional  # here: the import takes a second

    def affine(images: Tensor, shift: tuple[float, float], tangents: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        shear = [math.degrees(math.atan(tangent)) for tangent in tangents]
        corner = [0, 0] if any(tangents) else None  # sheared from the corner, not around the centre
        return functional.affine(images, 0.0, [int(pixels) for pixels in shift], 1.0, shear, center=corner)

    return {
        "shear_x": lambda images, tangent: affine(images, (0, 0), (tangent, 0)),
        "shear_y": lambda images, tangent: affine(images, (0, 0), (0, tangent)),
        "translate_x": lambda images, pixels: affine(images, (pixels, 0)),
        "translate_y": lambda images, pixels: affine(images, (0, pixels)),
        "rotate": functional.rotate,
        "brightness": lambda images, change: functional.adjust_brightness(images, 1 + change),
        "color": lambda images, change: functional.adjust_saturation(images, 1 + change),
        "contrast": lambda images, change: _adjust_contrast(images, 1 + change),
        "sharpness": lambda images, change: functional.adjust_sharpness(images, 1 + change),
        "posterize": lambda images, bits: functional.posterize(images, int(bits)),
        "solarize": functional.solarize,
        "autocontrast": lambda images, _: functional.autocontrast(images),
        "equalize": lambda images, _: functional.equalize(images),
    }


def _adjust_contrast(images: Tensor, factor: float) -> Tensor:
    """Scale contrast as torchvision's adjust_contrast, but around the exact mean of large images."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    mean = exact_mean(rgb_to_grayscale(images).permute(0, 2, 3, 1).float())
    return images.mul(factor).add_(mean, alpha=1 - factor).clamp_(0, 255).to(torch.uint8)
