"""train.profile leaves a trace of the steps that were asked for, and changes nothing else."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.monitoring.profiler import parse_steps
from tests.distributed import run_ranks
from tests.runs import failure_of, train_ranks, train_until, write_recipe


def steps_of(trace: Path) -> int:
    """How many optimizer steps a trace holds."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return len([event for event in events if event.get("name", "").startswith("Optimizer.step#")])


def test_each_rank_leaves_a_trace_of_just_these_steps(shards: Path, tmp_path: Path) -> None:
    train_ranks(2, write_recipe(tmp_path / "plain", shards))
    (code, out, _), _ = run_ranks(
        2, failure_of, str(write_recipe(tmp_path / "profiled", shards)), "train.profile=steps 3-5"
    )
    assert code == 0
    folder = tmp_path / "profiled" / "run" / "profile"
    assert f"the profile is in {folder}" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}-rank{rank}.{kind}"
        for name, kind in (("memory", "txt"), ("operations", "txt"), ("trace", "json.gz"))
        for rank in range(2)
    ]
    for rank in range(2):
        assert steps_of(folder / f"trace-rank{rank}.json.gz") == 3
    assert "aten::addmm" in (folder / "operations-rank0.txt").read_text()
    assert "CPU Mem" in (folder / "memory-rank0.txt").read_text()
    weights = [(tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("plain", "profiled")]
    assert weights[0] == weights[1]


def test_a_profile_is_of_the_start_that_takes_its_steps(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": "2 steps"})
    run_ranks(1, train_until, str(recipe), 5)  # saved at step 4
    ((code, out, _),) = run_ranks(1, failure_of, str(recipe), "train.profile=steps 1-4")
    assert code == 0
    assert "no profile: steps 1-4 were not among those of this start" in out
    assert not (tmp_path / "run" / "profile").exists()


def test_a_profile_to_the_end_of_the_run_is_written(shards: Path, tmp_path: Path) -> None:
    train_ranks(1, write_recipe(tmp_path, shards), "train.profile=steps 7-20")
    assert steps_of(tmp_path / "run" / "profile" / "trace-rank0.json.gz") == 2  # of 8


def test_a_profile_that_cannot_be_written_does_not_hurt_the_run(shards: Path, tmp_path: Path) -> None:
    ((code, out, _),) = run_ranks(1, without_disk, str(write_recipe(tmp_path, shards)))
    assert code == 0
    assert "the profile could not be written, training continues: No space left" in out
    assert "done: test accuracy" in out


def without_disk(recipe: str) -> tuple[int, str, str]:
    """Runs in a rank."""
    import torch

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    torch.profiler.profile.export_chrome_trace = full  # type: ignore[method-assign]
    return failure_of(recipe, "train.profile=step 2")


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), ("steps 10-20", (10, 20)), ("step 7", (7, 7)), ("steps 3 - 4", (3, 4))]
)
def test_steps(text: str, expected: tuple[int, int] | None) -> None:
    assert parse_steps(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10-20", 'write "steps 10-20"'),
        ("epochs 1-2", "is not a range of steps"),
        ("steps 20-10", "the last must not come before"),
        ("steps 0-3", "steps count from 1"),
        ("steps -1", "is not a range of steps"),
    ],
)
def test_other_texts_are_refused(text: str, expected: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        parse_steps(text)
    ((code, _, message),) = run_ranks(1, failure_of, str(write_recipe(tmp_path, shards)), f"train.profile={text}")
    assert code == 2
    assert "train.profile: " in message
