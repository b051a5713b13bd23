"""Averages of the weights against their equations, and how a run uses them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardstep.configs.durations import Duration, Progress
from shardstep.configs.errors import InputError
from shardstep.trainer.analysis.trained_model import open_trained_model
from shardstep.trainer.optim.average import Average, averaged
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.state import TrainState
from tests.distributed import run_ranks
from tests.runs import read_lines, train_ranks, train_until, write_recipe

PLAN = Plan(10, 40, 1, 1, Duration.parse("4 steps"))
WALK = [1.0, 3.0, -2.0, 5.0]  # the weight after each of four steps; 0 before the first


def follow(section: dict) -> tuple[list[float], list[float]]:
    """The average after each step, and the weight from which training continues."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    state = TrainState(module, module, optimizer=None)  # type: ignore[arg-type]
    average = Average(section, PLAN)
    average.begin(state)
    slow, fast = [], []
    for weight in WALK:
        before, state.progress = state.progress, PLAN.advance(state.progress, 10)
        torch.nn.init.constant_(module.weight, weight)
        average.update(state, before)
        assert state.average is not None
        slow.append(state.average["weight"].item())
        fast.append(module.weight.item())
    return slow, fast


def test_ema() -> None:
    # 0.5 * 0 + 0.5 * 1 = 0.5; 0.5 * 0.5 + 0.5 * 3 = 1.75; 0.875 - 1 = -0.125; -0.0625 + 2.5 = 2.4375
    slow, fast = follow({"name": "ema", "decay": 0.5, "rise": 0.0, "every": "1 steps"})
    assert slow == [0.5, 1.75, -0.125, 2.4375]
    assert fast == WALK


def test_lookahead_continues_from_the_average_every_second_step() -> None:
    # after step 2: 0.5 * 0 + 0.5 * 3; after step 4: 0.5 * 1.5 + 0.5 * 5
    slow, fast = follow({"name": "lookahead", "decay": 0.5, "rise": 0.0, "every": "2 steps"})
    assert slow == [0, 1.5, 1.5, 3.25]
    assert fast == [1.0, 1.5, -2.0, 3.25]


def test_a_decay_that_rises_ends_at_its_value() -> None:
    # 0.5 * (1/4)^2 = 1/32, 1/8, 9/32, 1/2 of what there was
    expected, value = [], 0.0
    for decay, weight in zip((1 / 32, 1 / 8, 9 / 32, 1 / 2), WALK, strict=True):
        value = decay * value + (1 - decay) * weight
        expected.append(value)
    slow, _ = follow({"name": "ema", "decay": 0.5, "rise": 2.0, "every": "1 steps"})
    assert slow == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_average_of_half_weights_follows_a_tiny_drift(dtype: torch.dtype) -> None:
    """From 1 towards 1 + 2^-7, of which a step adds 0.002: 0.00002, where the formats go in steps of 0.001 and 0.008."""
    module = torch.nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.ones_(module.weight)
    state = TrainState(module, module, optimizer=None)  # type: ignore[arg-type]
    average = Average({"name": "ema", "decay": 0.998, "rise": 0.0, "every": "1 steps"}, PLAN)
    average.begin(state)
    torch.nn.init.constant_(module.weight, 1 + 2**-7)
    for _ in range(1000):
        before, state.progress = state.progress, PLAN.advance(state.progress, 10)
        average.update(state, before)
    assert state.average is not None
    # the distance that is left: 0.998^1000 = 0.135 of 2^-7
    assert state.average["weight"].item() == pytest.approx(1 + (1 - 0.998**1000) * 2**-7, abs=1e-5)
    with averaged(state):
        assert module.weight.dtype == dtype
        assert torch.equal(module.weight, state.average["weight"].to(dtype))


def test_a_resumed_average_of_half_weights_is_the_same_to_the_last_bit(shards: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "average": {"name": "ema", "decay": 0.9},
        "train": {"duration": "8 steps", "precision": "bf16", "weights": "half"},
        "checkpoint": {"every": "3 steps", "keep": 1},
    }
    train_ranks(1, write_recipe(tmp_path / "whole", shards, **sections))
    interrupted = write_recipe(tmp_path / "cut", shards, **sections)
    run_ranks(1, train_until, str(interrupted), 5)
    train_ranks(1, interrupted)
    for kept in ("model.safetensors", "checkpoints/step-00000008/average.safetensors"):
        first, second = (load_file(tmp_path / name / "run" / kept) for name in ("whole", "cut"))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} == {torch.float32}


def test_the_weights_are_themselves_again_after_a_look_at_the_average() -> None:
    module = torch.nn.Linear(1, 1)
    shifted = {name: value.detach() + 1 for name, value in module.named_parameters()}
    state = TrainState(module, module, optimizer=None, average=shifted)  # type: ignore[arg-type]
    own = module.weight.detach().clone()

    def fail_on_the_average() -> None:
        with averaged(state):
            assert torch.equal(module.weight, own + 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_on_the_average()
    assert torch.equal(module.weight, own)


def test_the_average_is_what_is_evaluated_and_kept(shards: Path, tmp_path: Path) -> None:
    """With a decay of 1 it stays where it began: the run ends as it was before its first step, on 1 and 3 ranks."""
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        recipe = write_recipe(folder, shards, average={"name": "ema", "decay": 1.0}, train={"duration": "5 steps"})
        train_ranks(world_size, recipe)
        path = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
        final, kept = load_file(folder / "run" / "model.safetensors"), load_file(path / "average.safetensors")
        trained = load_file(path / "model.safetensors")
        assert all(torch.equal(final[name], kept[name]) for name in final)
        assert not all(torch.equal(final[name], trained[name]) for name in final)
        losses = [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl") if line["kind"] == "train"]
        assert json.loads((folder / "run" / "summary.json").read_text())["eval"]["loss"] > losses[-1]
    (path / "average.safetensors").write_bytes(bytes((path / "average.safetensors").stat().st_size))
    with pytest.raises(InputError, match="average.safetensors is damaged: its sha256 does not match"):
        open_trained_model(path, "cpu")


def test_progress_is_counted_in_steps_and_no_clock_changes_the_weights() -> None:
    limited, progress = replace(PLAN, max_train_s=10.0), Progress(1, 0, 10, 10)
    assert limited.share_done(progress, train_s=9.0) == 0.9
    assert PLAN.duration_done(progress) == limited.duration_done(progress) == 0.25
    module = torch.nn.Linear(1, 1, bias=False)
    state = TrainState(module, module, optimizer=None, progress=progress, wall_s=9.0)  # type: ignore[arg-type]
    average = Average({"name": "ema", "decay": 1.0, "rise": 1.0, "every": "1 steps"}, limited)
    average.begin(state)
    torch.nn.init.zeros_(module.weight)
    assert state.average is not None
    begun = state.average["weight"].item()
    average.update(state, Progress())
    assert state.average["weight"].item() == pytest.approx(
        0.25 * begun
    )  # its decay is 1 * 1/4, whatever the clock says


def test_weights_of_a_checkpoint_are_its_average_where_it_has_one(shards: Path, tmp_path: Path) -> None:
    """evaluate, report, predict and export load them."""
    recipe = write_recipe(tmp_path, shards, average={"name": "ema", "decay": 1.0}, train={"duration": "5 steps"})
    train_ranks(1, recipe)
    path = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    loaded, kept = open_trained_model(path, "cpu").module, load_file(path / "average.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in loaded.named_parameters())
