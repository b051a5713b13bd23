"""Weight gradients by one matrix product are those of the convolution, and are used where they are faster."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from shardstep.trainer import machine
from shardstep.trainer.kernels import unfold
from shardstep.trainer.kernels.convolutions import convert_convolutions, gains
from tests.runs import train_lines, train_ranks, write_recipe

DEEP = {"name": "whitening_cnn", "widths": [16, 128, 128]}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("count", "height", "width"), [(3, 4, 4), (5, 3, 5), (1, 3, 3), (0, 4, 4)])
def test_gradients_are_those_of_the_convolution(
    padding: int, count: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfold, "_PART_BYTES", 2 * 2 * 9 * 5 * height * width)  # few images at once: several parts
    torch.manual_seed(0)
    images = torch.randn(count, 5, height, width).double().to(memory_format=torch.channels_last)
    weight, bias = torch.randn(6, 5, 3, 3).double(), torch.randn(6).double()
    found, wanted = ([part.clone().requires_grad_() for part in (images, weight, bias)] for _ in range(2))
    outputs = unfold.convolve(found[0], found[1], found[2], padding)
    torch.testing.assert_close(outputs, functional.conv2d(*wanted, padding=padding), rtol=0, atol=0)
    gradient = torch.randn(outputs.shape).double()
    outputs.backward(gradient)
    functional.conv2d(*wanted, padding=padding).backward(gradient)
    for own, torchs in zip(found, wanted, strict=True):
        torch.testing.assert_close(own.grad, torchs.grad, rtol=1e-12, atol=1e-12)


def test_many_parts_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images, gradient = (torch.randn(200, 8, 4, 4).bfloat16() for _ in range(2))
    exact = unfold._weight_gradient(images.double(), gradient.double(), 1)
    errors = []
    for images_at_once in (200, 2):
        monkeypatch.setattr(unfold, "_PART_BYTES", images_at_once * 2 * 16 * 9 * 8)
        found = unfold._weight_gradient(images, gradient, 1)
        assert found.dtype == torch.bfloat16
        errors.append(((found.double() - exact).norm() / exact.norm()).item())
    assert max(errors) < 2**-8  # bf16 has 8 digits


def test_what_needs_no_gradient_gets_none() -> None:
    images, weight = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 3, 3, requires_grad=True)
    unfold.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is None
    assert weight.grad is not None
    images, weight = images.requires_grad_(), weight.detach()
    unfold.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is not None
    assert weight.grad is None


def test_gradients_of_gradients_are_refused() -> None:
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    outputs = unfold.convolve(torch.randn(2, 4, 3, 3), weight, None, 1)
    with pytest.raises(NotImplementedError, match="use train.convolutions=direct"):
        torch.autograd.grad(outputs.sum(), weight, create_graph=True)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to `convolve`."""
    calls: list[Any] = []
    convolve = unfold.convolve
    monkeypatch.setattr(unfold, "convolve", lambda *given: calls.append(given) or convolve(*given))
    return calls


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "faster"),
    [(128, 128, 4, True), (64, 256, 3, True), (512, 512, 1, True), (128, 128, 5, False), (64, 64, 3, False)],
)
def test_it_is_used_where_it_is_faster(inputs: int, outputs: int, size: int, faster: bool, used: list[Any]) -> None:
    layer, images = nn.Conv2d(inputs, outputs, 3, padding=1), torch.randn(2, inputs, size, size)
    assert gains(layer, (inputs, size, size), "unfold") == faster
    convert_convolutions(layer, "unfold")
    layer(images)
    assert not used  # in fp32
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).float().sum().backward()
        with torch.no_grad():
            layer(images)
    assert len(used) == faster
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    layer.requires_grad_(False).bfloat16()
    layer(images.bfloat16())
    assert len(used) == faster  # no weight to learn
    layer.requires_grad_(True)(images.bfloat16())
    assert len(used) == 2 * faster  # weights in half precision


def test_what_it_cannot_do_stays_torchs() -> None:
    layer = nn.Conv2d(128, 128, 3, padding=1).bfloat16()
    convert_convolutions(layer, "unfold")
    images = torch.randn(128, 4, 4).bfloat16()
    assert layer(images).shape == images.shape  # without a batch
    assert not unfold.is_faster(nn.Conv2d(128, 128, 3), torch.randn(1, 128, 2, 2))  # smaller than the filter


def test_a_precision_that_changes_takes_the_method_with_it_unless_they_are_asked_for(
    shards: Path, tmp_path: Path
) -> None:
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=DEEP | {"widths": [128, 128, 128]}, train=train)
    train_ranks(1, recipe, "train.convolutions=winograd")
    more = ["train.precision=bf16", "train.convolutions=unfold", "train.duration=4 steps"]
    train_ranks(1, recipe, *more, "run.allow_changes=[train.precision,train.convolutions,train.duration]")
    assert _method_of(tmp_path / "run") == "unfold"


def test_it_is_taken_by_itself_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """With micro-batches and weights in half precision, too; only rounding differs."""
    if machine.read_cpu().bf16_units not in ("AVX-512", "AMX"):
        pytest.skip("this processor has no units for it")
    train = {"precision": "bf16", "memory_format": "channels_last", "duration": "6 steps", "max_micro_batch": 8}
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        train_ranks(ranks, write_recipe(folder, shards, model=DEEP, train=train))
        assert _method_of(folder / "run") == "unfold"
        losses[ranks] = [line["loss"] for line in train_lines(folder / "run")]
    assert losses[2] == pytest.approx(losses[1], rel=2e-2)
    train_ranks(1, write_recipe(tmp_path / "half", shards, model=DEEP, train=train | {"weights": "half"}))
    assert [line["loss"] for line in train_lines(tmp_path / "half" / "run")] == pytest.approx(losses[1], rel=5e-2)


def _method_of(folder: Path) -> str:
    return str(yaml.safe_load((folder / "config.yaml").read_text())["train"]["convolutions"])
