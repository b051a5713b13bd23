"""The record of each start of a run."""

from pathlib import Path

from shardstep.trainer.run_dir import RunDir
from tests.distributed import run_ranks
from tests.runs import train_ranks, train_until, write_recipe


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
