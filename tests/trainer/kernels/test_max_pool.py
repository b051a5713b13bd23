"""The backward pass of max pooling is bitwise torch's, and is used where windows do not overlap."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardstep.datasets import native
from shardstep.trainer.kernels import max_pool
from shardstep.trainer.kernels.max_pool import SideBySideMaxPool2d, convert_max_pools


def _converted(**options: Any) -> nn.Module:
    layer = nn.MaxPool2d(**options)
    convert_max_pools(layer)
    return layer


def _gradient(layer: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    outputs = layer(images)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs.dtype)
    return torch.autograd.grad(outputs, images, weights)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("shape", "size"), [((3, 5, 8, 8), 2), ((2, 64, 7, 9), 2), ((2, 33, 7, 7), 3), ((1, 4, 3, 3), 3), ((0, 4, 4, 4), 2)]
)
def test_gradients_are_torchs_to_the_last_bit(
    shape: tuple[int, ...], size: int, layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = torch.randn(shape).mul(2).round().to(dtype).to(memory_format=layout)  # with many ties
    if images.numel():
        images[0, 0, 0, 1] = float("nan")
    used = []
    apply = max_pool._MaxPool.apply
    monkeypatch.setattr(max_pool._MaxPool, "apply", lambda *given: used.append(given) or apply(*given))
    layer = _converted(kernel_size=size)
    assert torch.equal(layer(images), nn.MaxPool2d(size)(images)) or images.isnan().any()
    assert not used  # nothing to learn
    assert torch.equal(_gradient(layer, images), _gradient(nn.MaxPool2d(size), images))
    assert len(used) == 1


def test_an_expanded_gradient_is_taken() -> None:
    images = torch.randn(2, 8, 4, 4)
    both = [images.clone().requires_grad_() for _ in range(2)]
    _converted(kernel_size=2)(both[0]).mean().backward()
    nn.MaxPool2d(2)(both[1]).mean().backward()
    assert torch.equal(both[0].grad, both[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 3}, {"kernel_size": 2, "padding": 1},
        {"kernel_size": 2, "dilation": 2}, {"kernel_size": 2, "ceil_mode": True}, {"kernel_size": (2, 3)},
        {"kernel_size": 2, "return_indices": True},
    ],
)  # fmt: skip
def test_other_windows_stay_torchs(options: dict[str, Any]) -> None:
    assert type(_converted(**options)) is nn.MaxPool2d


def test_what_it_cannot_do_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _converted(kernel_size=2)
    assert type(layer) is SideBySideMaxPool2d
    for images in (torch.randn(3, 4, 4), torch.randn(2, 3, 4, 4).double()):
        assert torch.equal(_gradient(layer, images), _gradient(nn.MaxPool2d(2), images))
    monkeypatch.setattr(native, "missing", lambda source: "a C compiler (there is no cc)")
    monkeypatch.setattr(max_pool, "_library", lambda: pytest.fail("there is none"))
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(_gradient(layer, images), _gradient(nn.MaxPool2d(2), images))


def test_gradients_of_gradients_are_refused() -> None:
    images = torch.randn(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(_converted(kernel_size=2)(images).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
