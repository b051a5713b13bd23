"""Winograd's method computes what the convolution does, and is used in training where it is faster."""

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


def _distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(3, 7, 7), (5, 15, 6), (1, 3, 3), (2, 4, 9), (4, 12, 5), (1, 8, 16)]
)
@pytest.mark.parametrize("channels", [(5, 6), (32, 70)])
def test_outputs_and_gradients_are_those_of_the_convolution(
    channels: tuple[int, int], count: int, height: int, width: int, padding: int, dtype: torch.dtype, close: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs, outputs = channels
    monkeypatch.setattr(
        winograd, "_PART_BYTES", 2 * 2 * 36 * 4 * (inputs + outputs)
    )  # few images at once: several parts
    torch.manual_seed(0)
    images = torch.randn(count, inputs, height, width).to(memory_format=torch.channels_last)
    own = [
        part.to(dtype).requires_grad_() for part in (images, torch.randn(outputs, inputs, 3, 3), torch.randn(outputs))
    ]
    exact = [part.detach().double().requires_grad_() for part in own]
    found = winograd.convolve(own[0], own[1], own[2], padding)
    wanted = functional.conv2d(*exact, padding=padding)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert _distance(found, wanted) < close
    for gradient, right in zip(_gradients(found, *own), _gradients(wanted, *exact), strict=True):
        assert gradient.dtype == dtype
        assert _distance(gradient, right) < close


def test_many_parts_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images, weight = torch.randn(200, 32, 4, 4).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    (wanted,) = _gradients(functional.conv2d(images.double(), exact, padding=1), exact)
    distances = []
    for images_at_once in (200, 1):
        monkeypatch.setattr(winograd, "_PART_BYTES", images_at_once * 2 * 36 * 64)
        distances.append(_distance(*_gradients(winograd.convolve(images, weight, None, 1), weight), wanted))
    assert distances[1] < 1.3 * distances[0]


def test_numbers_that_are_none_stay_none() -> None:
    images, weight = torch.randn(1, 32, 8, 8).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
    images[0, 3, 0, 0] = float("nan")
    outputs = winograd.convolve(images, weight, None, 1)
    assert outputs[0, :, :4, :4].isnan().all()
    assert not outputs[0, :, 4:, 4:].isnan().any()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    images, weight = torch.randn(9, 40, 7, 7), torch.randn(40, 40, 3, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pair = (images.clone().requires_grad_(), weight.clone().requires_grad_())
            found.append(_gradients(winograd.convolve(*pair, None, 1), *pair))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


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
        (128, 128, 8, True), (256, 256, 7, True), (64, 256, 15, True), (64, 64, 15, True),
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
    assert len(used) == faster  # an evaluation is torch's


def test_what_it_cannot_do_stays_torchs() -> None:
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    convert_convolutions(layer, "winograd")
    images = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(layer(input=images), plain(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(images[0]), plain(images[0]))  # without a batch
    with torch.no_grad():
        assert torch.equal(layer(images), plain(images))
    with torch.autocast("cpu", torch.float16):
        layer(images).float().sum().backward()
    assert layer.weight.grad is not None
    large = torch.randn(1, 64, 256, 256)
    assert winograd._speedup(layer, large) == 0
    small = torch.randn(1, 64, 2, 2)
    assert winograd._speedup(nn.Conv2d(64, 64, 3), small) == 0  # smaller than the filter
    layer.double()(images.double()).sum().backward()


def test_images_of_a_half_format_are_convolved_in_it() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    convert_convolutions(layer, "winograd")
    images = torch.randn(2, 64, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(images)
        assert outputs.dtype == torch.bfloat16
        nn.ReLU(inplace=True)(outputs).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_without_a_compiler_a_layer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    convert_convolutions(layer, "winograd")
    monkeypatch.setattr(winograd, "missing", lambda: "a C compiler (there is no cc)")
    images = torch.randn(2, 64, 8, 8)
    assert torch.equal(layer(images), plain(images))


def test_gradients_of_gradients_are_refused() -> None:
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    outputs = winograd.convolve(torch.randn(2, 4, 6, 6), weight, None, 1)
    with pytest.raises(NotImplementedError, match="use train.convolutions=direct"):
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
    settled = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["convolutions"]
    assert settled in ("direct", "winograd")
    other = {"direct": "winograd", "winograd": "direct"}[settled]
    code, _, told = failure_of(str(recipe), f"train.convolutions={other}")
    assert code == 2
    assert "train.convolutions" in told


def test_a_precision_that_changes_takes_the_method_with_it(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe, "train.convolutions=winograd")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = ["train.precision=fp16", "train.duration=4 steps"]
    allowed = "run.allow_changes=[train.precision,train.convolutions,train.duration]"
    train_ranks(1, recipe, f"run.dir={tmp_path / 'copy'}", *other, allowed)
    code, _, told = failure_of(str(recipe), *other)
    assert code == 2
    assert "train.precision: fp32 -> fp16\n  - train.convolutions: winograd -> direct\n" in told
