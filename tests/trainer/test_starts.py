"""The record of each start of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.starts import rounding_changes
from tests.distributed import run_ranks
from tests.runs import failure_of, train_ranks, train_until, write_recipe


def test_every_start_is_kept_and_a_finished_run_gets_none(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    run_ranks(1, train_until, str(recipe), 5)
    train_ranks(2, recipe, "log.every=2 steps")
    starts = RunDir(tmp_path / "run").starts
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 1), (4, 2)]
    assert starts[0]["command"] == f"shardstep train {recipe}"
    assert starts[1]["command"] == f"shardstep train {recipe} 'log.every=2 steps'"
    # 32 * 32 * 3 * 16 + 16, 16 * 10 + 10
    assert starts[0]["parameters"] == starts[0]["trained_parameters"] == 49168 + 170
    assert starts[0]["total_steps"] == 8  # 2 epochs of 101 samples by 30
    train_ranks(1, recipe)  # is finished
    assert RunDir(tmp_path / "run").starts == starts


START: dict[str, Any] = {
    "world_size": 1,
    "hardware": {"cpu": "Xeon", "vectors": "AVX-512", "threads": 2},
    "versions": {"torch": "2.15.0"},
}
ON_GPU = {"hardware": START["hardware"] | {"gpu": "H100"}}


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ({}, {}, []),
        ({}, {"hardware": START["hardware"] | {"threads": 1}}, ["1 thread instead of 2 threads"]),
        ({}, {"hardware": START["hardware"] | {"cpu": "EPYC"}}, ["EPYC, AVX-512 instead of Xeon, AVX-512"]),
        ({}, {"hardware": START["hardware"] | {"vectors": "AVX2"}}, ["Xeon, AVX2 instead of Xeon, AVX-512"]),
        ({}, {"versions": {"torch": "2.16.0", "python": "3.13"}}, ["torch 2.16.0 instead of torch 2.15.0"]),
        ({}, ON_GPU, ["H100 instead of Xeon, AVX-512"]),
        (ON_GPU, {"hardware": ON_GPU["hardware"] | {"threads": 1}}, []),
        (ON_GPU, {"hardware": ON_GPU["hardware"] | {"gpu": "H200"}}, ["H200 instead of H100"]),
        ({}, {"world_size": 2, "hardware": START["hardware"] | {"threads": 1}}, []),  # rounds otherwise by itself
        ({"hardware": {}, "versions": {}}, {}, []),  # unknown
        (
            {},
            {"hardware": START["hardware"] | {"threads": 4}, "versions": {"torch": "2.16.0"}},
            ["4 threads instead of 2 threads", "torch 2.16.0 instead of torch 2.15.0"],
        ),
    ],
)
def test_what_makes_a_start_round_otherwise(before: dict[str, Any], now: dict[str, Any], changes: list[str]) -> None:
    assert rounding_changes(START | before, START | now) == changes


def test_a_resume_that_rounds_otherwise_warns(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    run_ranks(1, train_until, str(recipe), 5)
    starts = RunDir(tmp_path / "run").starts
    starts[0]["versions"]["torch"] = "1.13.0"
    starts[0]["hardware"]["threads"] += 1
    (tmp_path / "run" / "starts.json").write_text(json.dumps(starts))
    code, _, errors = run_ranks(1, failure_of, str(recipe), "train.duration=2 epochs")[0]
    warnings = [line for line in errors.splitlines() if line.startswith("warning")]
    assert code == 0
    assert len(warnings) == 1
    assert "instead of torch 1.13.0: the result will differ in rounding" in warnings[0]
    assert f"instead of {starts[0]['hardware']['threads']} threads" in warnings[0]


def test_an_equal_resume_does_not_warn(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    run_ranks(1, train_until, str(recipe), 5)
    assert run_ranks(1, failure_of, str(recipe))[0][::2] == (0, "")
