"""Pictures of any size to images of one size: which part of a picture is kept, and what it is scaled to.

The boxes and sizes are those of torchvision's v2.RandomResizedCrop in training, and of v2.Resize and v2.CenterCrop
otherwise. decode_crop.py applies them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shardstep.configs.schema import CropVersion, DataConfig

Interpolation = Literal["bilinear", "bicubic"]
LARGEST_SIDE = 16_384
"""Pixels of a side of an image at most: one with three channels of floats takes 3 GB."""
RANDOM_CROP = "random_resized_crop"
_CROP_SHARE = 0.875  # of the shorter side, for evaluation where data.resize is null: 224 of 256 pixels, as in timm
_ATTEMPTS = 10  # as in torchvision
DRAWS = 2 * _ATTEMPTS + 2
"""How many random numbers one random crop takes."""


@dataclass(frozen=True)
class Box:
    """A rectangle, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Crop:
    """A region of a picture, the height and width that it is scaled to, and the window that is cut out of that.

    Nothing outside the region has an effect.
    """

    region: Box
    scaled: tuple[int, int]
    window: Box


@dataclass(frozen=True)
class RandomResizedCrop:
    """Read a random part of each picture, scaled to a square of side `size`; must be the first entry of data.augment.

    Szegedy et al. 2014, arXiv 1409.4842, section 6; parts are tried as by torchvision's v2.RandomResizedCrop.
    """

    size: int = 224
    """Side of the square in pixels, also of the images that are evaluated."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the part's share of the picture's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the part's width divided by its height; its logarithm is uniform."""
    interpolation: Interpolation = "bilinear"
    """How pictures are scaled, also for evaluation; with antialiasing."""

    def region(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """Return the part of a picture that DRAWS numbers from [0, 1) stand for.

        If none of ten attempts fits into the picture, it is the largest centre part whose ratio is in the range.
        """
        narrowest, widest = self.ratio
        for attempt in range(_ATTEMPTS):
            area = height * width * _between(*self.scale, draws[2 * attempt])
            ratio = math.exp(_between(math.log(narrowest), math.log(widest), draws[2 * attempt + 1]))
            part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < part_width <= width and 0 < part_height <= height:
                top, left = int(draws[-2] * (height - part_height + 1)), int(draws[-1] * (width - part_width + 1))
                return Box(top, left, part_height, part_width)
        part_width = min(width, max(1, round(height * widest)))
        part_height = min(height, max(1, round(width / narrowest)))
        return Box((height - part_height) // 2, (width - part_width) // 2, part_height, part_width)


@dataclass(frozen=True)
class Framing:
    """How pictures become images of `height` x `width` pixels.

    Attributes:
        cover: height and width of the frame that a picture is scaled to just cover, before its centre is cut out.
        random: what training reads in place of the centre.
        version: see data.crop_version.
    """

    height: int
    width: int
    cover: tuple[int, int]
    version: CropVersion
    random: RandomResizedCrop | None = None

    @classmethod
    def covering(cls, height: int, width: int, version: CropVersion) -> "Framing":
        """Return the framing that scales pictures until they just cover height x width, and cuts out the centre."""
        return cls(height, width, (height, width), version)

    @property
    def interpolation(self) -> Interpolation:
        return self.random.interpolation if self.random else "bilinear"

    def crop(self, height: int, width: int, draws: Sequence[float] | None = None) -> Crop:
        """Return the crop of a picture of height x width; without draws, of its centre."""
        if self.random and draws is not None:
            size = self.random.size
            return Crop(self.random.region(height, width, draws), (size, size), Box(0, 0, size, size))
        cover_height, cover_width = self.cover
        if height * cover_width <= width * cover_height:
            scaled = (cover_height, max(cover_width, cover_height * width // height))
        else:
            scaled = (max(cover_height, cover_width * height // width), cover_width)
        # Python's round, as in torchvision: 37.5 to 38, 36.5 to 36
        top, left = round((scaled[0] - self.height) / 2), round((scaled[1] - self.width) / 2)
        return Crop(Box(0, 0, height, width), scaled, Box(top, left, self.height, self.width))


def framing_of(config: DataConfig) -> Framing | None:
    """Return how the pictures of a checked recipe become images of one size; None if they are read as they are.

    A version that is not chosen yet counts as 2: all versions make images of the same size.
    """
    random = random_crop(config.augment)
    if random is None and config.resize is None:
        return None
    version = 2 if config.crop_version == "auto" else config.crop_version
    if random is None:
        assert config.resize is not None
        return Framing.covering(config.resize, config.resize, version)
    shorter = config.resize or int(random.size / _CROP_SHARE)
    return Framing(random.size, random.size, (shorter, shorter), version, random)


def random_crop(augment: Sequence[Mapping[str, Any]]) -> RandomResizedCrop | None:
    """Return the random crop of a checked data.augment."""
    for entry in augment:
        if entry["name"] == RANDOM_CROP:
            return RandomResizedCrop(**{key: value for key, value in entry.items() if key != "name"})
    return None


def random_crop_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with the random crop of a recipe whose options are resolved, and with the keys beside it."""
    random, names = random_crop(config.augment), [entry["name"] for entry in config.augment]
    if random is None:
        return []
    problems = []
    if names.index(RANDOM_CROP) or names.count(RANDOM_CROP) > 1:
        problems.append(
            f"data.augment: {RANDOM_CROP} is applied when an image is decoded: give it once, as the first entry"
        )
    if random.size > LARGEST_SIDE:
        problems.append(f"data.augment: size={random.size} must be at most {LARGEST_SIDE} pixels")
    if not 0 < random.scale[0] <= random.scale[1] <= 1:
        problems.append(
            f"data.augment: scale={list(random.scale)} must be two shares of an area, above 0 and at most 1"
        )
    if not 0 < random.ratio[0] <= random.ratio[1]:
        problems.append(f"data.augment: ratio={list(random.ratio)} must be two numbers above 0, the smaller one first")
    if config.resize is not None and config.resize < random.size:
        problems.append(
            f"data.resize={config.resize} must be at least the size of {RANDOM_CROP}, {random.size}: the centre square of "
            f"that size is cut out for evaluation"
        )
    if config.mode == "resident":
        problems.append(
            f"data.mode=resident keeps decoded images, but {RANDOM_CROP} decodes another part of an image each time: use "
            f"data.mode=stream or auto"
        )
    if config.crop_version == 1:
        problems.append(f"data.crop_version=1 knows no {RANDOM_CROP}: use 2, 3 or auto")
    return problems


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
