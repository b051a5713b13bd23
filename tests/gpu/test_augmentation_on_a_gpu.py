"""Augmentation on a GPU: the images and labels of a CPU, but for pixels that are rounded the other way."""

import pytest
import torch

from shardstep.datasets.augment import TRANSFORMS, build_mixing
from shardstep.datasets.rng import Draws
from tests.datasets.augment.test_transforms import OPTIONS, images

pytestmark = pytest.mark.gpu


def draws(device: str) -> Draws:
    index = torch.arange(33)
    return Draws(3, 0, index, index + 1000, torch.device(device))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_on_a_gpu(name: str, device: str) -> None:
    pixels, options = images(33, 40, 39), OPTIONS.get(name, {})
    expected = TRANSFORMS[name](pixels.clone(), draws("cpu"), **options)
    found = TRANSFORMS[name](pixels.clone().to(device), draws(device), **options)
    assert found.device.type == device
    # TF32 rounds sums of a convolution to 1 of 1024, and the nearest of two pixels may be the other one
    assert ((found.cpu().int() - expected.int()).abs() > 2).float().mean() < 0.005


@pytest.mark.parametrize("names", [["mixup"], ["cutmix"], ["mixup", "cutmix"]])
def test_mixing_on_a_gpu_is_that_of_a_cpu(names: list[str], device: str) -> None:
    mixing = build_mixing([{"name": name, "alpha": 0.7, "probability": 0.9} for name in names])
    assert mixing
    pixels, labels = images(33, 40, 39), torch.arange(33)
    expected, of_cpu = mixing(pixels.clone(), labels, draws("cpu"))
    found, of_device = mixing(pixels.clone().to(device), labels.to(device), draws(device))
    assert torch.equal(found.cpu(), expected)
    for one, other in zip(vars(of_cpu).values(), vars(of_device).values(), strict=True):
        assert other.device.type == device
        assert torch.equal(other.cpu(), one)
