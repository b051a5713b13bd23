"""Compiled training passes against uncompiled ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.runs import failure_of, train_lines, train_ranks, write_recipe


@pytest.mark.drill
@pytest.mark.parametrize(("world_size", "all_reduce"), [(1, "buckets"), (2, "buckets"), (2, "flat")])
def test_the_same_curve_compiled(shards: Path, tmp_path: Path, world_size: int, all_reduce: str) -> None:
    """With a short batch, one of which a rank has no share, and parameters that are frozen during the run."""
    curves = []
    for mode in ("none", "default"):
        recipe = write_recipe(
            tmp_path / mode,
            shards,
            model={"name": "whitening_cnn", "widths": [4, 4]},
            optimizer={"name": "sgd", "lr": 0.05, "groups": [{"match": "whitening.bias", "until": "3 steps"}]},
            # 101 samples: 50, 50 and 1
            train={"global_batch_size": 50, "duration": "6 steps", "compile": mode, "all_reduce": all_reduce},
        )
        train_ranks(world_size, recipe)
        curves.append([line["loss"] for line in train_lines(tmp_path / mode / "run")])
        assert json.loads((tmp_path / mode / "run" / "summary.json").read_text())["step"] == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.drill
def test_ranks_that_talk_in_each_pass_compile_the_same_ones(shards: Path, tmp_path: Path) -> None:
    """101 samples in batches of 49, 49 and 3: rank 0 has 24 and 1 of them, rank 1 has 25 and 2."""
    recipe = write_recipe(
        tmp_path,
        shards,
        model={"name": "whitening_cnn", "widths": [4, 4], "sync_batch_norm": True},
        train={"global_batch_size": 49, "duration": "3 steps", "compile": "default", "timeout_s": 700},
    )
    train_ranks(2, recipe)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 3


def test_a_rank_without_samples_and_compiled_ones_would_not_meet(shards: Path, tmp_path: Path) -> None:
    """101 samples in batches of 50, 50 and 1."""
    model = {"name": "whitening_cnn", "widths": [4, 4], "sync_batch_norm": True}
    recipe = write_recipe(tmp_path, shards, model=model, train={"global_batch_size": 50, "compile": "default"})
    (code, _, error), (other_code, *_) = run_ranks(2, failure_of, str(recipe))
    assert code == other_code == 2
    assert "some batches leave a rank without samples" in error


COUNTING = """
import sys
from shardstep.launch.train import main
from shardstep.trainer import loop
function = loop.train_step
def step(run, batch):
    from torch._dynamo.utils import counters  # not before the trainer has decided that it is needed
    print("graphs:", counters["stats"]["unique_graphs"])
    return function(run, batch)
loop.train_step = step
main(sys.argv[1:])
"""


@pytest.mark.drill
def test_no_step_waits_for_the_compiler(shards: Path, tmp_path: Path) -> None:
    """Neither the first, nor a short one, nor one after a freezing: everything is compiled when the run is built."""
    groups = [{"match": "1.bias", "until": "3 steps"}, {"match": "1.weight", "until": "1 epochs"}]
    recipe = write_recipe(
        tmp_path,
        shards,
        model={"name": "mlp", "hidden": [8]},
        optimizer={"name": "sgd", "lr": 0.05, "groups": groups},
        train={"global_batch_size": 50, "duration": "5 steps", "compile": "default"},  # 101 samples: 50, 50 and 1
    )
    done = subprocess.run([sys.executable, "-c", COUNTING, str(recipe)], capture_output=True, text=True, check=True)
    found = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("graphs:")]
    assert found == [3 * 2] * 5  # nothing frozen, one, both; batches of 50 and of 1
