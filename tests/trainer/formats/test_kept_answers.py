"""What was measured is kept: later starts read it, and another question is measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardstep.datasets.cache import cache_folder
from shardstep.trainer import machine
from shardstep.trainer.formats import measurement
from shardstep.trainer.formats.candidates import ComputeFormat
from shardstep.trainer.formats.kept_answers import Answer, Question, measured_answer
from shardstep.trainer.machine import Cpu
from tests.trainer.formats.test_measurement import OBJECTIVE, read_batch

FAST, SLOW = ComputeFormat("fp32", "channels_last"), ComputeFormat("fp32", "contiguous")
QUESTION = Question([SLOW, FAST], {"name": "mlp", "hidden": [16]}, {"name": "nll"}, (3, 4, 4), 10, 8)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function of a question that gives the answer, and counts in `ask.measured` how often it was measured."""
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path / "cache"))

    def measure(*given: Any) -> tuple[dict[ComputeFormat, list[float]], int]:
        asked.measured += 1
        return {SLOW: [0.02, 0.021, 0.04], FAST: [0.01, 0.011, 0.01]}, 4

    monkeypatch.setattr(measurement, "measure", measure)

    def asked(question: Question = QUESTION, anew: bool = False) -> Answer:
        return measured_answer(question, nn.Linear(1, 1), OBJECTIVE, read_batch, anew)

    asked.measured = 0
    return asked


def test_a_later_start_reads_what_the_first_has_measured(ask: Any) -> None:
    first, second = ask(), ask()
    assert ask.measured == 1
    assert (first.chosen, first.kept_in) == (FAST, None)
    assert first.seconds == {SLOW: 0.021, FAST: 0.01}
    assert dataclasses.replace(second, kept_in=None) == first
    assert str(first) == "measured: fp32 contiguous 21 ms, fp32 channels_last 10 ms for 4 images"
    assert str(second).startswith(f"measured on {first.measured[:10]}, kept in {cache_folder()}")
    evidence = json.loads(second.kept_in.read_text())
    assert evidence["seconds"]["fp32 contiguous"] == [0.02, 0.021, 0.04]
    assert evidence["question"]["processor"]["name"]


def test_it_is_measured_anew_when_asked(ask: Any) -> None:
    ask()
    assert ask(anew=True).kept_in is None
    assert ask.measured == 2
    assert ask().kept_in
    assert ask.measured == 2


OTHER = [
    {"formats": [FAST, SLOW]},
    {"model": {"name": "mlp", "hidden": [17]}},
    {"loss": {"name": "cross_entropy"}},
    {"image_shape": (3, 4, 5)},
    {"num_classes": 11},
    {"batch_size": 9},
]


@pytest.mark.parametrize("changed", OTHER, ids=lambda changed: next(iter(changed)))
def test_another_question_is_measured(changed: dict[str, Any], ask: Any) -> None:
    ask()
    assert ask(dataclasses.replace(QUESTION, **changed)).kept_in is None
    assert ask(dataclasses.replace(QUESTION, **changed)).kept_in


@pytest.mark.parametrize("what", ["threads", "processor", "versions"])
def test_another_machine_measures(what: str, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    threads = torch.get_num_threads() + 1
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    elif what == "processor":
        monkeypatch.setattr(machine, "read_cpu", lambda: Cpu("other", "AVX2", ""))
    else:
        monkeypatch.setattr(machine, "versions", lambda: {"torch": "9.9"})
    assert ask().kept_in is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seconds": {"fp64": [1]}, "chosen": "fp64"}'])
def test_a_damaged_answer_is_measured_again(content: str, ask: Any) -> None:
    ask()
    kept = ask().kept_in
    kept.write_text(content)
    assert ask().kept_in is None
    assert ask().kept_in == kept


def test_an_answer_to_another_question_does_not_count(ask: Any) -> None:
    ask()
    kept = ask().kept_in
    kept.write_text(kept.read_text().replace('"batch_size": 8', '"batch_size": 7'))
    assert ask().kept_in is None


def test_an_answer_without_its_question_does_not_count(ask: Any) -> None:
    ask()
    kept = ask().kept_in
    content = json.loads(kept.read_text())
    del content["question"]
    kept.write_text(json.dumps(content))
    assert ask().kept_in is None


def test_a_cache_that_cannot_be_written_costs_a_measurement(ask: Any) -> None:
    cache_folder().write_text("a file")
    assert ask().kept_in is ask().kept_in is None
    assert ask.measured == 2


def test_reads_no_more_than_it_measures() -> None:
    counts: list[int] = []

    def counted(count: int) -> tuple[Tensor, Tensor]:
        counts.append(count)
        return read_batch(count)

    model = nn.Sequential(nn.Conv2d(3, 10, 4), nn.Flatten())
    measurement.measure([SLOW, FAST], model, OBJECTIVE, counted, 2000)
    assert max(counts) <= 64
