"""Parameters that train in their time only, and the batch norms among them."""

from pathlib import Path

import torch

from tests.distributed import run_ranks
from tests.runs import write_recipe

GROUPS = [{"match": "groups.1.*", "from": "2 steps"}, {"match": "groups.0.*", "from": "1 epochs", "until": "6 steps"}]
LATE, EARLY = "groups.1", "groups.0"


def moved_by_step(recipe: str) -> list[set[str]]:
    """Runs in a rank: which of the two groups' weights, and which of their running means, each step moves.

    An evaluation before each step must not end what keeps the running means.
    """
    from shardstep.trainer.evaluation import evaluating
    from shardstep.trainer.loop import train_step
    from tests.trainer.distributed.test_gradients import build_run

    run, moved = build_run(recipe), []
    for batch in run.batches.from_position(0, 0):
        run.freezer.set_for(run.state.progress)
        with evaluating(run.state.module):
            assert not any(layer.training for layer in run.state.module.modules())
        before = {name: value.clone() for name, value in run.state.module.state_dict().items()}
        train_step(run, batch)
        run.state.progress = run.plan.advance(run.state.progress, batch.size)
        after = run.state.module.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        moved.append({
            f"{group} {what}"
            for group in (EARLY, LATE)
            for what in ("weight", "running_mean")
            if any(name.startswith(group) and name.endswith(what) for name in changed)
        })  # fmt: skip
        if len(moved) == 8:
            return moved
    raise AssertionError


def test_parts_train_in_their_time_and_norms_with_them(shards: Path, tmp_path: Path) -> None:
    """101 samples in batches of 30: an epoch is four steps."""
    recipe = write_recipe(
        tmp_path, shards,
        model={"name": "whitening_cnn", "widths": [8, 8]},
        optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "groups": GROUPS},
        train={"duration": "3 epochs"},
    )  # fmt: skip
    late = {f"{LATE} weight", f"{LATE} running_mean"}
    both = late | {f"{EARLY} weight", f"{EARLY} running_mean"}
    for moved in run_ranks(2, moved_by_step, str(recipe)):
        assert moved == [set()] * 2 + [late] * 2 + [both] * 2 + [late] * 2
