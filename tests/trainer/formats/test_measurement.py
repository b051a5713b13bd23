"""Choosing a compute format by measuring passes: the same one at every start, and the fastest but for 8 %."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.trainer.formats.candidates import ComputeFormat
from shardstep.trainer.formats.measurement import choose, measure
from shardstep.trainer.kernels import winograd
from shardstep.trainer.optim.losses import build_objective

OBJECTIVE = build_objective({"name": "cross_entropy", "label_smoothing": 0.0, "reduction": "mean"}, {"name": "mlp"})
HALF, HALF_NCHW, FULL, FULL_NCHW = FORMATS = [
    ComputeFormat(number, layout) for number in ("bf16", "fp32") for layout in ("channels_last", "contiguous")
]  # type: ignore[arg-type]


class Clocked(nn.Module):
    """A model whose passes take the times of a function of (format, number of the pass), by a fake clock."""

    now_s = 0.0

    def __init__(self, pass_s: Callable[[str, int], float]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 2)
        self.pass_s, self.passes = pass_s, Counter[str]()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clocked":
        return self  # so that one counter counts all passes

    def forward(self, images: Tensor) -> Tensor:
        number = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        layout = "channels_last" if images.is_contiguous(memory_format=torch.channels_last) else "contiguous"
        if self.training:
            self.passes[f"{number} {layout}"] += 1
            Clocked.now_s += self.pass_s(f"{number} {layout}", self.passes[f"{number} {layout}"])
        return self.conv(images).mean(dim=(2, 3))


def read_batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.ones(count, 3, 4, 4), torch.zeros(count, dtype=torch.long)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ComputeFormat, Counter[str]]]:
    """Returns the choice of a function of (format, number of the pass), and the passes that it took."""
    monkeypatch.setattr(time, "thread_time", lambda: Clocked.now_s)

    def measure_and_choose(pass_s: Callable[[str, int], float]) -> tuple[ComputeFormat, Counter[str]]:
        model = Clocked(pass_s).train()
        seconds, _ = measure(FORMATS, model, OBJECTIVE, read_batch, 8)
        return choose(seconds), model.passes

    return measure_and_choose


class Whereabouts(torch.autograd.Function):
    """The identity; remembers the thread of its backward pass."""

    threads: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Whereabouts.threads.append(threading.get_ident())
        return gradients[0]


def test_the_backward_pass_counts_for_the_clock_of_the_calling_thread() -> None:
    Whereabouts.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert Whereabouts.threads == [threading.get_ident()]


def test_what_compiles_longest_may_be_fastest(measured: Any) -> None:
    steady = {"bf16 channels_last": 0.030, "bf16 contiguous": 0.045, "fp32 channels_last": 0.09, "fp32 contiguous": 0.1}
    first = {"bf16 channels_last": 0.716, "bf16 contiguous": 0.3, "fp32 channels_last": 0.11, "fp32 contiguous": 0.12}

    def pass_s(name: str, number: int) -> float:
        return first[name] if number == 1 else first[name] / 2 if number == 2 else steady[name]

    chosen, passes = measured(pass_s)
    assert chosen == HALF
    assert min(passes.values()) >= 3  # all are warm before one is dropped


def test_what_is_far_behind_is_tried_no_further(measured: Any) -> None:
    steady = {"bf16 channels_last": 0.09, "bf16 contiguous": 0.17, "fp32 channels_last": 0.05, "fp32 contiguous": 0.06}
    chosen, passes = measured(lambda name, number: steady[name])
    assert chosen == FULL
    assert passes["bf16 contiguous"] == 2  # to warm up: 3.4 times the fastest
    assert passes["bf16 channels_last"] == 3  # and one round: 1.8 times the fastest
    assert passes["fp32 contiguous"] == passes["fp32 channels_last"] > 6


def test_of_a_precision_twice_as_slow_one_format_is_tried(measured: Any) -> None:
    steady = {"bf16 channels_last": 0.03, "bf16 contiguous": 0.02, "fp32 channels_last": 0.07, "fp32 contiguous": 0.01}
    chosen, passes = measured(lambda name, number: steady[name])
    assert chosen == HALF_NCHW
    assert passes["fp32 channels_last"] == 2
    assert passes["fp32 contiguous"] == 0


def test_it_takes_two_seconds_beyond_the_first_passes(measured: Any) -> None:
    began = Clocked.now_s
    _, passes = measured(lambda name, number: 1.0 if number == 1 else 0.07)
    assert Clocked.now_s - began - len(FORMATS) * 1.0 <= 2
    assert min(passes.values()) > 4
    _, passes = measured(lambda name, number: 3.0)  # a model that is this slow is only warmed up
    assert set(passes.values()) == {2}


def test_a_slow_model_needs_more_than_one_disturbed_pass_for_another_choice(measured: Any) -> None:
    steady = {"bf16 channels_last": 0.5, "bf16 contiguous": 0.52, "fp32 channels_last": 1.1, "fp32 contiguous": 1.2}

    def pass_s(name: str, number: int) -> float:
        return steady[name] * (1.4 if name == "bf16 channels_last" and number <= 2 else 1)

    chosen, passes = measured(pass_s)
    assert chosen == HALF
    assert passes["bf16 channels_last"] == passes["bf16 contiguous"] == 3
    chosen, passes = measured(lambda name, number: {**steady, "bf16 contiguous": 0.4}[name])
    assert chosen == HALF_NCHW
    assert passes["bf16 channels_last"] == passes["bf16 contiguous"] == 4


@pytest.mark.parametrize("busy", [False, True])
def test_every_start_makes_the_same_choice(busy: bool, measured: Any) -> None:
    """On a busy machine any pass takes up to twice its time, and some take ten times as long."""
    steady = {
        "bf16 channels_last": 0.026,
        "bf16 contiguous": 0.035,
        "fp32 channels_last": 0.08,
        "fp32 contiguous": 0.09,
    }

    def pass_s(draw: random.Random, name: str, number: int) -> float:
        noise = draw.uniform(1, 1.6) * (8 if draw.random() < 0.05 else 1) if busy else draw.uniform(1, 1.1)
        return steady[name] * noise * (6 if number == 1 else 1)

    for start in range(40):
        assert measured(partial(pass_s, random.Random(start)))[0] == HALF, start


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([[3.0, 3.0], [2.0, 2.0], [4.0], [4.0]], HALF_NCHW),
        ([[2.1, 2.1], [2.0, 2.0], [4.0], [4.0]], HALF),  # 5 % slower: not clearly
        ([[3.0, 3.0], [2.1, 2.1], [2.0, 2.0], [4.0]], HALF_NCHW),  # the first of equals
        ([[2.5, 2.5, 2.5, 1.0], [2.0, 2.0, 2.0, 2.0], [9.0], [9.0]], HALF_NCHW),  # faster in one of four rounds
        ([[2.5, 2.5, 1.9, 1.9], [2.0, 2.0, 2.0, 2.0], [9.0], [9.0]], HALF),  # faster in two of four
        (
            [[3.1, 3.1], [2.0, 3.2], [9.0], [9.0]],
            HALF_NCHW,
        ),  # so far behind that a slow pass of the other does not help
        ([[3.0], [2.0], [3.0], [3.0]], HALF_NCHW),
    ],
)
def test_the_first_that_is_not_clearly_slower_is_chosen(seconds: list[list[float]], chosen: ComputeFormat) -> None:
    assert choose(dict(zip(FORMATS, seconds, strict=True))) == chosen


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds, samples = measure(FORMATS, model, OBJECTIVE, read_batch, 6)
    assert samples == max(4, -(-6 // threads))
    assert set(seconds) == set(FORMATS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("channels", "batch_size", "samples"), [(64, 1, 1), (64, 2, 2), (64, 100, 50), (64, 1000, 64), (1024, 100, 8)]
)
def test_a_pass_takes_a_threads_share_of_the_batch(
    channels: int, batch_size: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 3x3 convolution of 1024 channels on 4x4 pixels is 0.3 GFLOP: 8 images are the most for one pass."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sizes = []
    wide = nn.Conv2d(channels, channels, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), wide, nn.AvgPool2d(4), nn.Flatten())
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    _, found = measure(FORMATS[2:], model, OBJECTIVE, read_batch, batch_size)
    assert found == samples
    assert max(sizes) == samples


def test_winograd_is_what_is_measured_as_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    used: Counter[str] = Counter()
    monkeypatch.setattr(
        winograd,
        "convolve",
        lambda *given: used.update(["winograd"]) or functional.conv2d(*given[:3], padding=given[3]),
    )
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def wide_batch(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 128, 8, 8), torch.zeros(count, dtype=torch.long)

    measure([FULL, FULL_NCHW], model, OBJECTIVE, wide_batch, 2)
    assert not used
    measure([FULL, ComputeFormat("fp32", "channels_last", "winograd")], model, OBJECTIVE, wide_batch, 2)
    assert used
    assert type(model[0]) is nn.Conv2d
