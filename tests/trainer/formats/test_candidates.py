"""Which compute formats fit a recipe, a model and a processor; and which precisions a device refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import TrainConfig
from shardstep.datasets import native
from shardstep.trainer import precision
from shardstep.trainer.formats.candidates import ComputeFormat, candidates
from shardstep.trainer.machine import Cpu
from shardstep.trainer.validate_recipe import validate_recipe

CPU, CONV = torch.device("cpu"), nn.Conv2d(3, 3, 1)
AVX2, AVX512 = Cpu("old", vectors="AVX2", bf16_units=""), Cpu("middle", vectors="AVX-512", bf16_units="")
AMX, UNKNOWN = Cpu("new", vectors="AVX-512", bf16_units="AMX"), Cpu("other", vectors="", bf16_units="")


@pytest.mark.parametrize(
    ("cpu", "tried"), [(AVX2, {"fp32"}), (AVX512, {"fp32"}), (AMX, {"bf16", "fp32"}), (UNKNOWN, {"bf16", "fp32"})]
)
def test_bf16_is_tried_where_it_may_pay(cpu: Cpu, tried: set[str]) -> None:
    assert {choice.precision for choice in candidates(TrainConfig(), CONV, (3, 8, 8), CPU, cpu)} == tried
    asked = TrainConfig(precision="bf16", memory_format="contiguous")
    assert candidates(asked, CONV, (3, 8, 8), CPU, cpu) == [ComputeFormat("bf16", "contiguous")]


def test_winograd_is_tried_where_it_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Conv2d(128, 128, 3, padding=1)

    def tried(model: nn.Module, cpu: Cpu = AVX2, size: int = 8, **options: Any) -> list[ComputeFormat]:
        found = candidates(TrainConfig(**options), model, (model.in_channels, size, size), CPU, cpu)  # type: ignore[arg-type]
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
        found = candidates(TrainConfig(**options), model, (model.in_channels, size, size), CPU, cpu)  # type: ignore[arg-type]
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
        candidates(asked, wide, (128, 8, 8), torch.device("cuda", 0), AVX2)
    with pytest.raises(
        InputError, match="winograd has no effect: this model has no 3x3 convolutions that it would make faster"
    ):
        candidates(asked, CONV, (3, 8, 8), CPU, AVX2)


@pytest.mark.parametrize("other", ["train.precision=fp16", "train.compile=default", "train.device=cuda"])
def test_winograd_is_refused_outside_its_purpose(other: str) -> None:
    with pytest.raises(
        InputError, match=f"winograd is for bf16 and fp32 on a CPU, not for {other}: use auto or direct"
    ):
        validate_recipe(load_recipe("smoke", ["train.convolutions=winograd", other]))


def test_an_lstm_is_refused_where_there_is_none_in_that_format() -> None:
    recurrent = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(InputError, match="no LSTM in bf16 on this CPU; use fp32, or model.cell=gru"):
        precision.check_precision("bf16", CPU, recurrent, AVX2)
    with pytest.raises(InputError, match="no LSTM in fp16 on this CPU; use bf16 or fp32, or model.cell=gru"):
        precision.check_precision("fp16", CPU, recurrent, AMX)
    for number, module, cpu in (("fp32", recurrent, AVX2), ("bf16", recurrent, AMX), ("bf16", nn.GRU(3, 3), AVX2)):
        assert precision.check_precision(number, CPU, module, cpu) is None
