"""Boxes and sizes are torchvision's."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from shardstep.datasets.framing import DRAWS, Box, Crop, Framing, RandomResizedCrop
from shardstep.datasets.scale import cut_and_scale
from tests.photographs import picture

side = st.one_of(st.integers(1, 60), st.integers(1, 5000))


def torchvisions_region(transform: v2.RandomResizedCrop, height: int, width: int, draws: list[float]) -> Box:
    """The box that torchvision's code computes when it draws these numbers."""
    pairs, places = iter(draws[:-2]), iter(draws[-2:])

    class Drawn:
        def uniform_(self, low: float, high: float) -> torch.Tensor:
            return torch.tensor(float(low) + (float(high) - float(low)) * next(pairs), dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(low + int(next(places) * (high - low)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size: Drawn())
        patch.setattr(torch, "randint", randint)
        found = transform.make_params([torch.zeros(1, 1, 1).expand(1, height, width)])
    return Box(found["top"], found["left"], found["height"], found["width"])


@given(side, side, st.lists(st.floats(0, 1, exclude_max=True, allow_subnormal=False), min_size=DRAWS, max_size=DRAWS))
def test_random_parts_are_those_of_torchvision(height: int, width: int, draws: list[float]) -> None:
    expected = torchvisions_region(v2.RandomResizedCrop(224), height, width, draws)
    assert RandomResizedCrop().region(height, width, draws) == expected


@pytest.mark.parametrize(("scale", "ratio"), [((0.5, 0.5), (1, 1)), ((0.9, 1), (2, 3)), ((0.01, 0.02), (0.1, 0.2))])
def test_random_parts_have_the_given_scales_and_ratios(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    random = RandomResizedCrop(scale=scale, ratio=ratio)
    transform = v2.RandomResizedCrop(224, scale=scale, ratio=ratio)
    for draws in np.random.default_rng(0).random((200, DRAWS)).tolist():
        assert random.region(375, 500, draws) == torchvisions_region(transform, 375, 500, draws)


def sizes() -> Iterator[tuple[int, int]]:
    yield from [(299, 224), (224, 299), (500, 375), (375, 500), (224, 224), (225, 224), (1, 1), (1, 7), (33, 47)]
    yield from np.random.default_rng(0).integers(1, 700, (30, 2)).tolist()


@pytest.mark.parametrize(("shorter", "size"), [(224, 224), (256, 224), (73, 64), (9, 8)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_centres_are_those_of_torchvision(shorter: int, size: int, interpolation: str) -> None:
    transform = v2.Compose([v2.Resize(shorter, v2.InterpolationMode(interpolation)), v2.CenterCrop(size)])
    random = RandomResizedCrop(size, interpolation=interpolation)  # type: ignore[arg-type]
    framing = Framing(size, size, (shorter, shorter), 2, random)
    for height, width in sizes():
        pixels = picture(height, width)
        found = cut_and_scale(pixels, framing.crop(height, width), framing.interpolation)
        expected = np.array(transform(Image.fromarray(pixels)))
        assert found.shape == expected.shape, (height, width)
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 2, (height, width)  # rounded otherwise than by Pillow
        assert difference.mean() <= 0.2, (height, width)


def test_boxes_by_hand() -> None:
    # 299x224: nothing is scaled; (299 - 224) / 2 = 37.5 is rounded to 38, the even number
    assert Framing.covering(224, 224, 2).crop(224, 299) == Crop(Box(0, 0, 224, 299), (224, 299), Box(0, 38, 224, 224))
    # 500x375: 500 * 224 / 375 = 298.67 is cut to 298
    assert Framing.covering(224, 224, 2).crop(375, 500).scaled == (224, 298)
    # a frame that is no square: 50x100 covers 20x60 when it is 30x60
    assert Framing.covering(20, 60, 2).crop(50, 100) == Crop(Box(0, 0, 50, 100), (30, 60), Box(5, 0, 20, 60))
