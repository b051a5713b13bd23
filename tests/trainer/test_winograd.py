"""Gradients by Winograd's method are those of the convolution, and are used where they are faster."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from shardstep.trainer import winograd
from shardstep.trainer.convolutions import convert_convolutions, gains
from tests.runs import failure_of, train_ranks, write_recipe


def _gradients(outputs: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(outputs, of, torch.randn(outputs.shape, generator=generator).to(outputs.dtype))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(3, 7, 7), (5, 15, 6), (1, 3, 3), (2, 4, 9), (4, 12, 5), (1, 8, 16)]
)
def test_gradients_are_those_of_the_convolution(
    padding: int, count: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_PART_BYTES", 2 * 4 * 36 * 8 * 11)  # few images at once: several parts
    torch.manual_seed(0)
    images = torch.randn(count, 5, height, width).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(6, 5, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    outputs = winograd.convolve(images, weight, bias, padding)
    found = _gradients(outputs, images, weight, bias)
    exact = [part.detach().double().requires_grad_() for part in (images, weight, bias)]
    wanted_outputs = functional.conv2d(*exact, padding=padding)
    torch.testing.assert_close(outputs.double(), wanted_outputs, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(found, _gradients(wanted_outputs, *exact), strict=True):
        assert gradient.shape == wanted.shape
        assert (gradient - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_what_needs_no_gradient_gets_none() -> None:
    images, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True)
    winograd.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is None
    assert weight.grad is not None
    images, weight = images.requires_grad_(), weight.detach()
    winograd.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is not None
    assert weight.grad is None


def test_no_images_have_no_gradient() -> None:
    images, weight = torch.randn(0, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    winograd.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is not None
    assert images.grad.shape == images.shape
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    images, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    (by_winograd,) = torch.autograd.grad(winograd.convolve(images, weight, None, 1).mean(dim=(2, 3)).sum(), weight)
    (direct,) = torch.autograd.grad(functional.conv2d(images, weight, padding=1).mean(dim=(2, 3)).sum(), weight)
    torch.testing.assert_close(by_winograd, direct, atol=1e-5, rtol=1e-4)


def test_other_convolutions_stay_as_they_are() -> None:
    kept = [
        nn.Conv2d(128, 128, 5, padding=1),
        nn.Conv2d(128, 128, 3, stride=2),
        nn.Conv2d(128, 128, 3, dilation=2),
        nn.Conv2d(128, 128, 3, groups=2),
        nn.Conv2d(128, 128, 3, padding=2),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
    ]
    model = nn.Sequential(*kept, nn.Conv2d(128, 128, 3))
    names = list(model.state_dict())
    convert_convolutions(model, "winograd")
    assert [type(layer) for layer in model] == [nn.Conv2d] * len(kept) + [winograd.WinogradConv2d]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "faster"),
    [
        (128, 128, 8, True), (256, 256, 7, True), (64, 256, 15, True),
        (128, 128, 5, False),  # 36 tiles' worth of work for 25 pixels
        (16, 16, 32, False),  # sums that take longer than what they save
    ],
)  # fmt: skip
def test_it_is_used_where_it_is_faster(
    inputs: int, outputs: int, size: int, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    assert gains(layer, (inputs, size, size), "winograd") == faster
    convert_convolutions(layer, "winograd")
    used = []
    monkeypatch.setattr(
        winograd, "convolve", lambda *given: used.append(given) or functional.conv2d(*given[:3], padding=given[3])
    )
    images = torch.randn(1, inputs, size, size)
    layer(images)
    assert len(used) == faster
    with torch.no_grad():
        layer(images)
    assert len(used) == faster  # outputs are the same, and there is no backward pass to gain


def test_what_it_cannot_do_stays_torchs() -> None:
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    convert_convolutions(layer, "winograd")
    images = torch.randn(2, 64, 8, 8)
    assert torch.equal(layer(input=images), plain(images))
    assert torch.equal(layer(images[0]), plain(images[0]))  # without a batch
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).float().sum().backward()
    assert layer.weight.grad is not None
    large = torch.randn(1, 64, 256, 256)
    assert winograd._speedup(layer, large) == 0
    small = torch.randn(1, 64, 2, 2)
    assert winograd._speedup(nn.Conv2d(64, 64, 3), small) == 0  # smaller than the filter
    layer.double()(images.double()).sum().backward()


def test_gradients_of_gradients_are_refused() -> None:
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    outputs = winograd.convolve(torch.randn(2, 4, 6, 6), weight, None, 1)
    with pytest.raises(NotImplementedError, match="use train.conv_gradients=direct"):
        torch.autograd.grad(outputs.sum(), weight, create_graph=True)


def test_looking_for_gains_changes_no_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.Conv2d(128, 128, 3)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert gains(model, (3, 12, 12), "winograd")
    assert [part.training for part in model] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model[2]._forward_pre_hooks


WIDE = {"name": "article_cnn", "dropout": 0.0}


def test_auto_is_settled_by_the_first_start(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "auto", "memory_format": "auto", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe)
    settled = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["conv_gradients"]
    assert settled in ("direct", "winograd")
    other = {"direct": "winograd", "winograd": "direct"}[settled]
    code, _, told = failure_of(str(recipe), f"train.conv_gradients={other}")
    assert code == 2
    assert "train.conv_gradients" in told


def test_a_precision_that_changes_takes_the_gradients_with_it(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe, "train.conv_gradients=winograd")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = ["train.precision=bf16", "train.duration=4 steps"]
    allowed = "run.allow_changes=[train.precision,train.conv_gradients,train.duration]"
    train_ranks(1, recipe, f"run.dir={tmp_path / 'copy'}", *other, allowed)
    code, _, told = failure_of(str(recipe), *other)
    assert code == 2
    assert "train.precision: fp32 -> bf16\n  - train.conv_gradients: winograd -> direct\n" in told
