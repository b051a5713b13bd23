"""Transforms against torchvision's, given the parameters that ours drew: equal to the pixel, or by how much not."""

import math
from typing import Any

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from shardstep.datasets.augment.color import blur, color_jitter, grayscale
from shardstep.datasets.augment.geometry import flip, random_crop, rotate
from shardstep.datasets.augment.mixing import cutmix, mixup
from shardstep.datasets.augment.occlusion import erasing
from shardstep.datasets.augment.policies import (
    STRENGTHS,
    WIDE,
    magnitude_of,
    operations_by_name,
    rand_magnitudes,
    randaugment,
    trivial_augment,
)
from tests.datasets.augment.test_transforms import draws, images

SIZES = [(32, 32, 3), (17, 30, 3), (28, 28, 1)]


def channels_first(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 3, 1, 2)


def differences(ours: torch.Tensor, theirs: list[torch.Tensor]) -> torch.Tensor:
    return (channels_first(ours).int() - torch.cat(theirs).int()).abs()


@pytest.mark.parametrize(("height", "width", "channels"), SIZES)
def test_flip_grayscale_and_rotate(height: int, width: int, channels: int) -> None:
    shape = (64, height, width, channels)
    originals = channels_first(images(*shape)).split(1)
    chances = draws().uniform()[:, 0]
    grey = [
        functional.rgb_to_grayscale(image, channels) if chance < 0.5 else image
        for image, chance in zip(originals, chances, strict=True)
    ]
    assert not differences(grayscale(images(*shape), draws(), probability=0.5), grey).any()
    mirrored = [
        functional.horizontal_flip(image) if chance < 0.5 else image
        for image, chance in zip(originals, chances, strict=True)
    ]
    assert not differences(flip(images(*shape), draws()), mirrored).any()
    angles = ((2 * chances - 1) * 90).tolist()
    rotated = [functional.rotate(image, angle) for image, angle in zip(originals, angles, strict=True)]
    assert not differences(rotate(images(*shape), draws(), degrees=90), rotated).any()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_random_crop(mode: Any) -> None:
    places = draws().integers(9, columns=2).tolist()
    padded = functional.pad(channels_first(images(64, 10, 12)), [4], padding_mode=mode)
    theirs = [
        functional.crop(image, top, left, 10, 12) for image, (top, left) in zip(padded.split(1), places, strict=True)
    ]
    assert not differences(random_crop(images(64, 10, 12), draws(), padding_mode=mode), theirs).any()


@pytest.mark.parametrize("kernel_size", [1, 5, 13])
@pytest.mark.parametrize(("height", "width", "channels"), SIZES)
def test_blur(height: int, width: int, channels: int, kernel_size: int) -> None:
    shape = (64, height, width, channels)
    deviations = [0.1 + 1.9 * place if chance < 0.5 else None for chance, place in draws().uniform(columns=2).tolist()]
    theirs = [
        functional.gaussian_blur(image, [kernel_size] * 2, [deviation] * 2) if deviation else image
        for image, deviation in zip(channels_first(images(*shape)).split(1), deviations, strict=True)
    ]
    apart = differences(blur(images(*shape), draws(), kernel_size=kernel_size), theirs)
    assert apart.max() <= 1  # two passes round differently
    assert apart.float().mean() < 1e-4


@pytest.mark.parametrize(("height", "width", "channels"), SIZES)
def test_erasing(height: int, width: int, channels: int) -> None:
    """As RandomErasing.make_params computes the box, from the same uniform numbers."""
    shape = (64, height, width, channels)
    mine = draws()
    chances, areas, ratios, places = (mine.uniform(columns).tolist() for columns in (1, 10, 10, 2))
    theirs = []
    for row, image in enumerate(channels_first(images(*shape)).split(1)):
        for area, ratio in zip(areas[row], ratios[row], strict=True):
            area, ratio = height * width * (0.02 + 0.31 * area), 0.3 * 11.0**ratio  # log 0.3 to log 3.3
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < height and wide < width and chances[row][0] < 0.5:
                top, left = int(places[row][0] * (height - tall + 1)), int(places[row][1] * (width - wide + 1))
                image = functional.erase(image, top, left, tall, wide, torch.zeros(1, dtype=torch.uint8))
                break
        theirs.append(image)
    assert not differences(erasing(images(*shape), draws()), theirs).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_hue(channels: int) -> None:
    pixels, off = images(64, 20, 21, channels), {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    mine = draws()
    mine.uniform(columns=3)  # of the factors that are off
    turns = ((2 * mine.uniform()[:, 0] - 1) * 0.3).tolist()
    theirs = [
        functional.adjust_hue(image, turn) for image, turn in zip(channels_first(pixels).split(1), turns, strict=True)
    ]
    assert not differences(color_jitter(pixels, draws(), hue=0.3, **off), theirs).any()


@pytest.mark.parametrize(
    ("option", "adjust"),
    [("brightness", functional.adjust_brightness), ("saturation", functional.adjust_saturation)],
)
def test_jitter_rounds_where_torchvision_cuts_off(option: str, adjust: Any) -> None:
    pixels, column = images(64, 20, 21), ["brightness", "contrast", "saturation"].index(option)
    options = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0} | {option: 0.4}
    factors = (1 + 0.4 * (2 * draws().uniform(columns=3)[:, column] - 1)).tolist()
    theirs = [adjust(image, factor) for image, factor in zip(channels_first(pixels).split(1), factors, strict=True)]
    assert differences(color_jitter(pixels, draws(), **options), theirs).max() <= 1


# --- policies ---------------------------------------------------------------------------------------------------------

POLICIES = [
    pytest.param(v2.RandAugment(), rand_magnitudes(17, 30), id="randaugment"),
    pytest.param(v2.TrivialAugmentWide(), WIDE, id="trivial_augment"),
]


def name_in_torchvision(name: str) -> str:
    return "AutoContrast" if name == "autocontrast" else "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize(("policy", "largest"), POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_at_every_strength(policy: Any, largest: dict[str, float], channels: int) -> None:
    pixels = channels_first(images(5, 17, 30, channels))
    pixels[4] //= 20  # little contrast
    assert [name_in_torchvision(name) for name in largest] == list(policy._AUGMENTATION_SPACE)
    for name, (magnitudes_of, signed) in policy._AUGMENTATION_SPACE.items():
        ours = next(own for own in largest if name_in_torchvision(own) == name)
        magnitudes = magnitudes_of(STRENGTHS, 17, 30)
        for strength in range(STRENGTHS if magnitudes is not None else 1):
            for sign in (1, -1) if signed else (1,):
                theirs = 0.0 if magnitudes is None else float(magnitudes[strength])
                expected = policy._apply_image_or_video_transform(
                    pixels, name, sign * theirs, InterpolationMode.NEAREST, fill={}
                )
                if name != "Identity":
                    found = operations_by_name()[ours](pixels, sign * magnitude_of(ours, largest[ours], strength))
                    assert torch.equal(found, expected), (name, strength, sign)


@pytest.mark.parametrize("policy", ["randaugment", "trivial_augment"])
def test_each_image_gets_what_it_drew(policy: str) -> None:
    pixels, mine = images(200, 17, 30), draws(count=200)
    expected = channels_first(pixels.clone())
    for _ in range(3 if policy == "randaugment" else 1):
        numbers = mine.uniform(columns=2 if policy == "randaugment" else 3).tolist()
        for row, (operation, *rest) in enumerate(numbers):
            largest = rand_magnitudes(17, 30) if policy == "randaugment" else WIDE
            name = list(largest)[int(operation * 14)]
            strength = 12 if policy == "randaugment" else int(rest[0] * 31)
            magnitude = magnitude_of(name, largest[name], strength)
            if rest[-1] < 0.5 and name not in ("posterize", "solarize"):
                magnitude = -magnitude
            if name != "identity":
                expected[row] = operations_by_name()[name](expected[row : row + 1], magnitude)[0]
    if policy == "randaugment":
        found = randaugment(pixels, draws(count=200), num_ops=3, magnitude=12)
    else:
        found = trivial_augment(pixels, draws(count=200))
    assert torch.equal(channels_first(found), expected)


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_mixup_differs_by_the_rounding_to_whole_levels() -> None:
    pairs, numbers = images(64, 9, 8).unflatten(0, (32, 2)), draws(count=32).uniform(columns=4)
    mixed, weights = mixup(pairs.clone(), numbers, alpha=0.5)
    theirs = v2.MixUp(num_classes=2)
    for pair, found, weight in zip(pairs, mixed, weights.tolist(), strict=True):
        expected = theirs.transform(
            channels_first(pair).float(), {"labels": torch.zeros(2), "batch_size": 2, "lam": weight}
        )
        assert (channels_first(found) - expected).abs().max() < 0.5 + 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 20)])
def test_cutmix(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, numbers = images(400, height, width).unflatten(0, (200, 2)), draws(count=200).uniform(columns=4)
    mixed, weights = cutmix(pairs.clone(), numbers, alpha=1.0)
    theirs = v2.CutMix(num_classes=2)
    for pair, found, weight, (_, share, row, column) in zip(pairs, mixed, weights, numbers, strict=True):
        # of Beta(1, 1), which is uniform, the inverse is the number itself
        monkeypatch.setattr(theirs._dist, "sample", lambda _, share=share: share)
        places = iter([int(column * width), int(row * height)])
        monkeypatch.setattr(torch, "randint", lambda *_, size, places=places: torch.tensor([next(places)]))
        params = theirs.make_params([channels_first(pair)])
        expected = theirs.transform(channels_first(pair), {"labels": torch.zeros(2), "batch_size": 2} | params)
        assert torch.equal(channels_first(found), expected)
        assert weight.item() == pytest.approx(params["lam_adjusted"])
