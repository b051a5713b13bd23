"""Choosing a precision and a memory format by a measured step of each."""

import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import TrainConfig
from shardstep.trainer import precision
from shardstep.trainer.kernels import native, winograd
from shardstep.trainer.machine import Cpu
from shardstep.trainer.optim.losses import build_objective
from shardstep.trainer.precision import ComputeFormat
from shardstep.trainer.validate_recipe import validate_recipe

PASSES: Counter[str] = Counter()
SECONDS = {"bf16 channels_last": 2.0, "bf16 contiguous": 0.16, "fp32 channels_last": 0.14, "fp32 contiguous": 0.2}


class Clocked(nn.Module):
    """A model whose passes take the times above, by a fake clock."""

    now_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 2)

    def forward(self, images: Tensor) -> Tensor:
        number = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        layout = "channels_last" if images.is_contiguous(memory_format=torch.channels_last) else "contiguous"
        PASSES[f"{number} {layout}"] += 1
        Clocked.now_s += SECONDS[f"{number} {layout}"]
        return self.conv(images).mean(dim=(2, 3))


def test_what_is_behind_is_tried_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    PASSES.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: Clocked.now_s)
    choices = [
        ComputeFormat(number, layout) for number in ("bf16", "fp32") for layout in ("channels_last", "contiguous")
    ]  # type: ignore[arg-type]
    objective = build_objective(
        {"name": "cross_entropy", "label_smoothing": 0.0, "reduction": "mean"}, {"name": "clocked"}
    )
    images, labels = torch.randn(4, 3, 4, 4), torch.randint(0, 10, (4,))
    seconds = precision.measure(choices, Clocked(), objective, images, labels)
    # Limits of 2, 1.2 and 1.1 times 0.14 s
    assert PASSES == {"bf16 channels_last": 1, "bf16 contiguous": 3, "fp32 channels_last": 3, "fp32 contiguous": 2}
    assert list(seconds.values()) == pytest.approx(list(SECONDS.values()))


def test_one_that_is_left_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    PASSES.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: Clocked.now_s)
    objective = build_objective(
        {"name": "cross_entropy", "label_smoothing": 0.0, "reduction": "mean"}, {"name": "clocked"}
    )
    images, labels = torch.randn(4, 3, 4, 4), torch.randint(0, 10, (4,))
    choices = [ComputeFormat("bf16", "channels_last"), ComputeFormat("fp32", "channels_last")]
    precision.measure(choices, Clocked(), objective, images, labels)
    assert PASSES == {"bf16 channels_last": 1, "fp32 channels_last": 1}


CPU, CONV = torch.device("cpu"), nn.Conv2d(3, 3, 1)
AVX2, AVX512 = Cpu("old", vectors="AVX2", bf16_units=""), Cpu("middle", vectors="AVX-512", bf16_units="")
AMX, UNKNOWN = Cpu("new", vectors="AVX-512", bf16_units="AMX"), Cpu("other", vectors="", bf16_units="")


@pytest.mark.parametrize(
    ("cpu", "tried"), [(AVX2, {"fp32"}), (AVX512, {"fp32"}), (AMX, {"bf16", "fp32"}), (UNKNOWN, {"bf16", "fp32"})]
)
def test_bf16_is_tried_where_it_may_pay(cpu: Cpu, tried: set[str]) -> None:
    assert {choice.precision for choice in precision.candidates(TrainConfig(), CONV, (3, 8, 8), CPU, cpu)} == tried
    asked = TrainConfig(precision="bf16", memory_format="contiguous")
    assert precision.candidates(asked, CONV, (3, 8, 8), CPU, cpu) == [ComputeFormat("bf16", "contiguous")]


def test_winograd_is_tried_where_it_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Conv2d(128, 128, 3, padding=1)

    def tried(model: nn.Module, cpu: Cpu = AVX2, size: int = 8, **options: Any) -> list[ComputeFormat]:
        found = precision.candidates(TrainConfig(**options), model, (model.in_channels, size, size), CPU, cpu)  # type: ignore[arg-type]
        return [choice for choice in found if choice.convolutions == "winograd"]

    fp32, bf16 = (ComputeFormat(precision, "channels_last", "winograd") for precision in ("fp32", "bf16"))
    assert tried(wide) == tried(wide, AMX, precision="fp32") == tried(wide, memory_format="channels_last") == [fp32]
    assert tried(wide, AMX) == tried(wide, AMX, memory_format="channels_last") == [bf16, fp32]
    assert tried(wide, AMX, precision="bf16") == [bf16]
    assert tried(CONV) == tried(wide, size=5) == tried(wide, convolutions="direct") == []
    assert tried(wide, memory_format="contiguous") == tried(wide, compile="default") == []
    # whoever has given both has left nothing to measure, and gets what needs no measurement
    assert tried(wide, precision="fp32", memory_format="channels_last") == []
    asked = {"precision": "fp32", "memory_format": "contiguous", "convolutions": "winograd"}
    assert tried(wide, **asked) == [ComputeFormat("fp32", "contiguous", "winograd")]
    assert tried(wide, AMX, convolutions="winograd", memory_format="channels_last") == [bf16, fp32]
    monkeypatch.setattr(native, "missing", lambda source: "a C compiler (there is no cc)")
    assert tried(wide) == []


def test_unfold_takes_the_place_of_direct_where_it_gains() -> None:
    deep = nn.Conv2d(128, 128, 3, padding=1)

    def tried(cpu: Cpu = AMX, model: nn.Conv2d = deep, size: int = 4, **options: Any) -> set[ComputeFormat]:
        found = precision.candidates(TrainConfig(**options), model, (model.in_channels, size, size), CPU, cpu)  # type: ignore[arg-type]
        return {choice for choice in found if choice.precision == "bf16" and choice.convolutions != "winograd"}

    direct, unfold = ComputeFormat("bf16", "channels_last"), ComputeFormat("bf16", "channels_last", "unfold")
    both_given = {"precision": "bf16", "memory_format": "channels_last"}
    assert tried() == {unfold, ComputeFormat("bf16", "contiguous")}
    assert (
        tried(**both_given) == tried(**both_given, convolutions="unfold") == {unfold}
    )  # by a rule: nothing to measure
    assert tried(convolutions="unfold", memory_format="contiguous") == {ComputeFormat("bf16", "contiguous", "unfold")}
    assert tried(Cpu("arm", vectors="NEON", bf16_units="NEON"), **both_given) == {
        direct
    }  # where it has not been measured
    with pytest.raises(
        InputError, match="unfold is for bf16, for which this processor has no units: use auto or direct"
    ):
        tried(AVX2, convolutions="unfold")
    other = [{"convolutions": "direct"}, {"compile": "default"}, {"size": 5}, {"model": CONV}, {"cpu": UNKNOWN}]
    assert all(tried(**both_given | options) == {direct} for options in other)  # type: ignore[arg-type]


def test_winograd_is_refused_where_there_is_none() -> None:
    asked, wide = TrainConfig(convolutions="winograd"), nn.Conv2d(128, 128, 3, padding=1)
    with pytest.raises(InputError, match="winograd is for CPUs, and this is cuda:0: use auto or direct"):
        precision.candidates(asked, wide, (128, 8, 8), torch.device("cuda", 0), AVX2)
    with pytest.raises(
        InputError, match="winograd has no effect: this model has no 3x3 convolutions that it would make faster"
    ):
        precision.candidates(asked, CONV, (3, 8, 8), CPU, AVX2)


@pytest.mark.parametrize("other", ["train.precision=fp16", "train.compile=default", "train.device=cuda"])
def test_winograd_is_refused_outside_its_purpose(other: str) -> None:
    with pytest.raises(
        InputError, match=f"winograd is for bf16 and fp32 on a CPU, not for {other}: use auto or direct"
    ):
        validate_recipe(load_recipe("smoke", ["train.convolutions=winograd", other]))


def test_winograd_is_what_is_measured_as_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    used: Counter[str] = Counter()
    monkeypatch.setattr(
        winograd,
        "convolve",
        lambda *given: used.update(["winograd"]) or functional.conv2d(*given[:3], padding=given[3]),
    )
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    objective = build_objective({"name": "cross_entropy", "label_smoothing": 0.0, "reduction": "mean"}, {"name": "mlp"})
    images, labels = torch.randn(2, 128, 8, 8), torch.zeros(2, dtype=torch.long)
    precision.measure([ComputeFormat("fp32", "channels_last")], model, objective, images, labels)
    assert not used
    precision.measure([ComputeFormat("fp32", "channels_last", "winograd")], model, objective, images, labels)
    assert used
    assert type(model[0]) is nn.Conv2d


def test_an_lstm_is_refused_where_there_is_none_in_that_format() -> None:
    recurrent = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(InputError, match="no LSTM in bf16 on this CPU; use fp32, or model.cell=gru"):
        precision.check_precision("bf16", CPU, recurrent, AVX2)
    with pytest.raises(InputError, match="no LSTM in fp16 on this CPU; use bf16 or fp32, or model.cell=gru"):
        precision.check_precision("fp16", CPU, recurrent, AMX)
    for number, module, cpu in (("fp32", recurrent, AVX2), ("bf16", recurrent, AMX), ("bf16", nn.GRU(3, 3), AVX2)):
        assert precision.check_precision(number, CPU, module, cpu) is None
