"""Crops of decoded pixels are the same to the last bit in C and by torch."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest

from shardstep.datasets import native, scale
from shardstep.datasets.decode_crop import decode_crop
from shardstep.datasets.framing import DRAWS, Box, Crop, Framing, Interpolation, RandomResizedCrop
from shardstep.datasets.scale import cut_and_scale
from tests.photographs import JPEG_KINDS, jpeg, picture

INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.missing.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    yield
    native.missing.cache_clear()


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Random pixels, half of them black or white, with which sums are largest."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(draw.random(pixels.shape) < 0.5, np.where(pixels < 128, 0, 255), pixels).astype(np.uint8)


def whole(height: int, width: int, scaled: tuple[int, int]) -> Crop:
    return Crop(Box(0, 0, height, width), scaled, Box(0, 0, *scaled))


def assert_as_torch(pixels: np.ndarray, crop: Crop, interpolation: Interpolation) -> None:
    found = cut_and_scale(pixels, crop, interpolation)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, scale._by_torch(pixels, crop, interpolation, None), f"{crop} {interpolation}")


def test_it_is_compiled_here() -> None:
    assert native.missing(scale._SOURCE) is None  # the tests need a C compiler


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_random_regions_scales_and_windows(channels: int, interpolation: Interpolation) -> None:
    draw = np.random.default_rng(channels)

    def side() -> tuple[int, int, int, int, int, int]:
        size = int(draw.integers(1, draw.choice([8, 60, 500])))
        length, scaled = int(draw.integers(1, size + 1)), int(draw.integers(1, draw.choice([8, 60, 300])))
        count = int(draw.integers(1, scaled + 1))
        return (
            size,
            int(draw.integers(size - length + 1)),
            length,
            scaled,
            int(draw.integers(scaled - count + 1)),
            count,
        )

    for seed in range(150):
        height, top, region_height, scaled_height, first_row, rows = side()
        width, left, region_width, scaled_width, first_column, columns = side()
        region, window = Box(top, left, region_height, region_width), Box(first_row, first_column, rows, columns)
        crop = Crop(region, (scaled_height, scaled_width), window)
        if crop.scaled != (region_height, region_width):
            assert_as_torch(noise(height, width, channels, seed), crop, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [
        (1, 1, (2, 3)),
        (1, 1, (900, 1)),
        (3, 5, (400, 700)),
        (400, 700, (1, 1)),
        (9000, 3, (2, 3)),
        (3, 9000, (3, 2)),
        (9000, 2, (9001, 1)),
        (120, 90, (120, 45)),  # one side is not scaled
        (120, 90, (60, 90)),
        # where the largest weight loses a bit, and sums of products no longer fit 24 bits, and beside it
        *((side * 16, side * 16 + 5, (16, 16)) for side in (2, 4, 8, 16, 33, 64)),
        (63, 65, (16, 16)),
        (3, 12288, (2, 512)),  # weights end in halves of the last bit
        (6144, 1, (256, 1)),
    ],
)
def test_extreme_scales(
    height: int, width: int, scaled: tuple[int, int], channels: int, interpolation: Interpolation
) -> None:
    for pixels in (noise(height, width, channels), np.full((height, width, channels), 255, dtype=np.uint8)):
        assert_as_torch(pixels, whole(height, width, scaled), interpolation)


@pytest.mark.parametrize(
    "view",
    [
        lambda pixels: pixels[::-1],
        lambda pixels: pixels[:, ::-1],
        lambda pixels: pixels[:, :, ::-1],
        lambda pixels: pixels.transpose(1, 0, 2),
        lambda pixels: pixels[5:40, 7:60],
        lambda pixels: pixels[::2, ::3],
        lambda pixels: pixels[:, :, :1],
        lambda pixels: pixels[:, :, 1][:, :, np.newaxis],
        lambda pixels: np.asfortranarray(pixels),
        lambda pixels: np.broadcast_to(pixels[:1], pixels.shape),
    ],
)
def test_any_layout_in_memory(view: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = view(noise(70, 90, 3))
    height, width, _ = pixels.shape
    assert_as_torch(pixels, whole(height, width, (33, 44)), "bilinear")
    assert_as_torch(pixels, Crop(Box(3, 5, height - 4, width - 5), (64, 64), Box(8, 9, 50, 51)), "bicubic")


def test_given_memory_is_used_and_nothing_beside_it() -> None:
    pixels, memory = noise(70, 90, 3), np.full((3, 40, 50, 3), 77, dtype=np.uint8)
    crop = Crop(Box(0, 0, 70, 90), (48, 62), Box(2, 5, 40, 50))
    place = memory[1]
    assert cut_and_scale(pixels, crop, "bilinear", place) is place
    assert np.array_equal(place, cut_and_scale(pixels, crop, "bilinear"))
    assert (memory[[0, 2]] == 77).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_without_a_compiler_pixels_are_the_same(kind: str, mode: str, request: pytest.FixtureRequest) -> None:
    data = jpeg(picture(375, 500), **JPEG_KINDS[kind])
    framings = [
        Framing(64, 64, (73, 73), 2, RandomResizedCrop(64, interpolation=interpolation))
        for interpolation in INTERPOLATIONS
    ]
    drawn = [None, *np.random.default_rng(0).random((3, DRAWS)).tolist()]

    def crops() -> list[np.ndarray]:
        return [decode_crop(data, mode, framing, draws) for framing in framings for draws in drawn]

    in_c = crops()
    request.getfixturevalue("no_compiler")
    assert native.missing(scale._SOURCE) is not None
    for one, other in zip(in_c, crops(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_many_threads_scale_at_once() -> None:
    sizes = [(60 + 40 * number, 500 - 40 * number) for number in range(10)] * 8
    pictures = [noise(*size, 3) for size in sizes]

    def scaled(number: int) -> np.ndarray:
        return cut_and_scale(pictures[number], whole(*sizes[number], (64, 64)), "bilinear")

    expected = [scaled(number) for number in range(len(sizes))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(scaled, range(len(sizes))))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_memory_is_flat() -> None:
    pixels, crop = noise(375, 500, 3), whole(375, 500, (224, 224))
    peaks = []
    for _ in range(3):
        for _ in range(100):
            cut_and_scale(pixels, crop, "bilinear")
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[2] - peaks[0] < 2000  # KiB; a leak of one crop would be 30 MB
