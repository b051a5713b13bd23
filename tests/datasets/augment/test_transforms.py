"""Transforms by themselves: by hand, in any batch, and as they were."""

import hashlib

import numpy as np
import pytest
import torch

from shardstep.datasets.augment import TRANSFORMS, Normalize, build_transforms
from shardstep.datasets.augment.color import color_jitter
from shardstep.datasets.augment.geometry import alternating_flip, flip, random_crop, shrink, translate
from shardstep.datasets.augment.occlusion import cutout, erasing
from shardstep.datasets.rng import Draws


def images(count: int, height: int = 6, width: int = 5, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8))


def draws(positions: torch.Tensor | None = None, count: int = 64, epoch: int = 0) -> Draws:
    index = torch.arange(count) if positions is None else positions
    return Draws(3, epoch, index, index + 1000)


SAME_SIZE = [name for name in TRANSFORMS if name != "shrink"]
OPTIONS: dict[str, dict] = {
    "shrink": {"size": 4, "epochs": 9},
    "color_jitter": {"hue": 0.2},
    "erasing": {"fill": "noise"},
}
"""Options that make each transform do all that it can, where the defaults do not."""
DIGESTS = {
    "flip": "adaca9776e22c42a",
    "alternating_flip": "38dedd40d591fd99",
    "translate": "d75ee2658c185be1",
    "random_crop": "3f45a033ad571299",
    "rotate": "c8e551a50b6e60c8",
    "shrink": "25f7ab6d4469313d",
    "color_jitter": "39a4a9b77dabdb9b",
    "grayscale": "04e3338ab5837109",
    "blur": "083749d76ca2002a",
    "cutout": "37077d34364ccbfa",
    "erasing": "8424b1e5193f1cf4",
    "randaugment": "e2a3394e7636b7c6",
    "trivial_augment": "eb32d0052213c40c",
}
"""Of 64 images of 12x11 pixels: what a recipe with these transforms trains on. A run must not find others when it resumes."""


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform_draws_and_does_what_it_did(name: str) -> None:
    result = TRANSFORMS[name](images(64, 12, 11), draws(), **OPTIONS.get(name, {}))
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize(("height", "width", "channels"), [(6, 5, 3), (7, 8, 1), (33, 31, 3)])
@pytest.mark.parametrize("name", SAME_SIZE)
def test_a_sample_is_transformed_the_same_in_any_batch(name: str, height: int, width: int, channels: int) -> None:
    shape, options = (64, height, width, channels), OPTIONS.get(name, {})
    whole = TRANSFORMS[name](images(*shape), draws(), **options)
    for part in (slice(0, 1), slice(7, 20), slice(63, 64)):
        alone = TRANSFORMS[name](images(*shape)[part], draws(torch.arange(64)[part]), **options)
        assert torch.equal(alone, whole[part])
    assert whole.shape == shape
    assert whole.dtype == torch.uint8


@pytest.mark.parametrize("name", SAME_SIZE)
def test_large_images_are_the_same_with_any_batch_and_threads(name: str) -> None:
    # 360,900 values: torch sums one such image by several threads, in another order than several images
    before = torch.get_num_threads()
    try:
        found = []
        for threads, parts in ((1, [slice(0, 6)]), (2, [slice(row, row + 1) for row in range(6)])):
            torch.set_num_threads(threads)
            options = OPTIONS.get(name, {})
            done = [
                TRANSFORMS[name](images(6, 300, 401)[part], draws(torch.arange(6)[part]), **options) for part in parts
            ]
            found.append(torch.cat(done))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", SAME_SIZE)
def test_an_empty_batch_stays_empty(name: str) -> None:
    assert TRANSFORMS[name](images(0), draws(count=0)).shape == (0, 6, 5, 3)


@pytest.mark.parametrize("name", [name for name in SAME_SIZE if name != "alternating_flip"])
def test_epochs_differ(name: str) -> None:
    assert not torch.equal(TRANSFORMS[name](images(64), draws()), TRANSFORMS[name](images(64), draws(epoch=1)))


def test_flip_mirrors_about_half() -> None:
    originals, result = images(64), flip(images(64), draws())
    mirrored = (result == originals.flip(2)).all(dim=(1, 2, 3))
    kept = (result == originals).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48
    assert torch.equal(flip(images(64), draws(), probability=1.0), originals.flip(2))


def test_alternating_flip_shows_each_image_both_ways() -> None:
    originals = images(64)
    first, second, third = (alternating_flip(images(64), draws(epoch=epoch)) for epoch in range(3))
    assert torch.equal(first, second.flip(2))
    assert torch.equal(first, third)
    assert 16 < (first == originals).all(dim=(1, 2, 3)).sum() < 48


def test_alternating_flip_belongs_to_the_image_not_to_its_position() -> None:
    ids = torch.arange(64)
    here = alternating_flip(images(64), Draws(3, 0, torch.arange(64), ids))
    there = alternating_flip(images(64), Draws(3, 0, torch.arange(64) + 500, ids))
    assert torch.equal(here, there)


def test_translate_against_numpy() -> None:
    pad, originals, result = 3, images(64), translate(images(64), draws(), pixels=3)
    shifts = draws().integers(7, columns=2)
    for image, shifted, (down, right) in zip(originals.numpy(), result.numpy(), shifts.tolist(), strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        assert np.array_equal(shifted, padded[down : down + 6, right : right + 5])
    assert len({tuple(shift) for shift in shifts.tolist()}) > 20


def test_random_crop_against_numpy() -> None:
    pad, originals, result = 3, images(64), random_crop(images(64), draws(), padding=3)
    shifts = draws().integers(7, columns=2)
    for image, cut, (down, right) in zip(originals.numpy(), result.numpy(), shifts.tolist(), strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        assert np.array_equal(cut, padded[down : down + 6, right : right + 5])
    reflected = random_crop(images(64), draws(), padding=3, padding_mode="reflect")
    assert torch.equal(reflected, translate(images(64), draws(), pixels=3))
    assert torch.equal(random_crop(images(9), draws(count=9), padding=0), images(9))


@pytest.mark.parametrize("channels", [1, 3])
def test_translate_by_nothing(channels: int) -> None:
    assert torch.equal(translate(images(9, channels=channels), draws(count=9), pixels=0), images(9, channels=channels))


def test_cutout_blackens_a_square() -> None:
    white = torch.full((200, 8, 8, 3), 255, dtype=torch.uint8)
    holes = (cutout(white, draws(count=200), size=4) == 0).all(dim=3)
    areas = holes.sum(dim=(1, 2))
    assert areas.max() == 16  # 4 x 4 inside
    assert areas.min() == 4  # 2 x 2 in a corner: the centre is a pixel of the image
    for hole in holes:
        rows, columns = hole.any(dim=1).nonzero()[:, 0], hole.any(dim=0).nonzero()[:, 0]
        assert hole.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 60), (1, 9)])
def test_erasing_blackens_boxes_of_the_given_areas_and_ratios(height: int, width: int) -> None:
    count, scale, ratio = 400, (0.1, 0.2), (0.5, 2.0)
    white = torch.full((count, height, width, 3), 255, dtype=torch.uint8)
    holes = (erasing(white, draws(count=count), probability=0.75, scale=scale, ratio=ratio) == 0).all(dim=3)
    erased = holes[holes.any(dim=(1, 2))]
    assert (len(erased) == 0) == (height == 1)  # a box is smaller than the image
    if height > 1:
        assert abs(len(erased) / count - 0.75) < 0.1  # 4 standard deviations: 4 sqrt(0.75 x 0.25 / 400) = 0.09
    for hole in erased:
        box_height, box_width = int(hole.any(dim=1).sum()), int(hole.any(dim=0).sum())
        assert hole.sum() == box_height * box_width
        # sides are rounded to whole pixels
        assert scale[0] < (box_height + 0.5) * (box_width + 0.5) / (height * width)
        assert (box_height - 0.5) * (box_width - 0.5) / (height * width) < scale[1]
        assert ratio[0] < (box_height + 0.5) / (box_width - 0.5)
        assert (box_height - 0.5) / (box_width + 0.5) < ratio[1]


def test_erasing_with_noise_fills_the_same_boxes_with_all_values_alike() -> None:
    black, noisy = (
        erasing(torch.full((400, 33, 31, 3), 255, dtype=torch.uint8), draws(count=400), fill=fill)
        for fill in ("black", "noise")
    )
    assert (noisy[black != 0] == 255).all()
    values = torch.bincount(noisy[black == 0].int(), minlength=256)
    expected = values.sum() / 256
    assert expected > 400
    assert ((values - expected).abs() < 5 * expected.sqrt()).all()
    assert abs(torch.corrcoef(torch.stack([noisy[black == 0][:-1], noisy[black == 0][1:]]).float())[0, 1]) < 0.02


def test_color_jitter_by_hand() -> None:
    # brightness x: each value times the factor; contrast and saturation off
    factor = 1 + (2 * draws(count=4).uniform(columns=3)[:, 0] - 1) * 0.5
    result = color_jitter(images(4), draws(count=4), brightness=0.5, contrast=0, saturation=0)
    expected = (images(4).double() * factor.view(-1, 1, 1, 1)).round().clamp(0, 255)
    assert (result.double() - expected).abs().max() <= 1  # float32 may round the other way


def test_saturation_leaves_grey_alone() -> None:
    grey = images(4, channels=1).expand(-1, -1, -1, 3).contiguous()
    assert (
        color_jitter(grey.clone(), draws(count=4), brightness=0, contrast=0, saturation=1).int() - grey
    ).abs().max() <= 1


def test_each_transform_of_a_list_draws_its_own_numbers() -> None:
    twice = build_transforms([{"name": "flip", "probability": 0.5}] * 2)
    result, shared = images(64), draws()
    for transform in twice:
        result = transform(result, shared)
    flipped = (result != images(64)).any(dim=(1, 2, 3))
    assert 16 < flipped.sum() < 48  # with shared numbers the second flip would undo the first for all


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_normalize(count: int) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    normalize = Normalize(mean, std, (6, 5, 3), torch.device("cpu"))
    result = normalize(images(count))
    expected = ((images(count).double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    assert result.shape == (count, 3, 6, 5)
    assert torch.allclose(result.double(), expected, atol=1e-6)
    if count:
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_shrink() -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    images[0, :2, :2], images[0, 2:, 2:] = 40, 200
    small = shrink(images, draws(count=2, epoch=1), size=2, epochs=2)
    assert small.shape == (2, 2, 2, 3)
    assert small.dtype == torch.uint8
    # one quarter is 40 and one 200; antialiasing lets each look a little beyond its edge
    assert small[0, 0, 0, 0] < small[0, 1, 1, 0]
    assert small[1].max() == 0
    assert torch.equal(shrink(images[1:], draws(count=1, epoch=1), size=2, epochs=2), small[1:])
    assert shrink(images, draws(count=2, epoch=2), size=2, epochs=2) is images


def test_shrink_raises_the_size_step_by_step() -> None:
    transforms = build_transforms([{"name": "shrink", "size": size, "epochs": size // 4} for size in (4, 8, 12)])
    sides = []
    for epoch in range(4):
        seen = images(2, height=16, width=16)
        for transform in transforms:
            seen = transform(seen, draws(count=2, epoch=epoch))
        sides.append(seen.shape[1])
    assert sides == [4, 8, 12, 16]


def test_normalize_takes_smaller_images() -> None:
    images = torch.randint(0, 256, (3, 2, 2, 3), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    cpu = torch.device("cpu")
    whole, small = (Normalize(mean, std, (side, side, 3), cpu)(images) for side in (4, 2))
    assert torch.equal(whole, small)
