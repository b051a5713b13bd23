"""The recipe's keys reach the order of the batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardstep.configs.load import load_recipe
from shardstep.configs.resolve import Choices, resolve
from shardstep.configs.schema import OrderVersion
from shardstep.datasets.batches import TrainBatches
from shardstep.datasets.order import OrderConfig
from shardstep.trainer import data
from shardstep.trainer.optim.plan import make_plan
from shardstep.trainer.validate_recipe import validate_recipe


def batches_of(shards: Path, keys: list[str]) -> TrainBatches:
    sets = [f"data.train={shards / 'train'}", f"data.test={shards / 'test'}"]
    recipe = validate_recipe(load_recipe("smoke", [*sets, *keys]))
    chosen = data.choose_order_version(recipe.data)
    resolved = resolve(recipe, Choices("stream", "cpu", "fp32", "channels_last", "direct", chosen, 2))
    loaded = data.load(resolved.data, "stream", data.open_parts(resolved.data), torch.device("cpu"))
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    return data.train_batches(resolved, accelerator, loaded, make_plan(resolved.train, 101, False, 1))


@pytest.mark.parametrize(("given", "version"), [("auto", 2), ("1", 1), ("2", 2)])
def test_the_order_is_that_of_the_recipe(shards: Path, given: str, version: OrderVersion) -> None:
    keys = ["run.seed=3", "data.lanes=4", "data.window_shards=2", f"data.order_version={given}"]
    assert batches_of(shards, keys).order == OrderConfig([17] * 5 + [16], 3, 4, 2, version)


def test_copies_of_a_sample_are_not_partners(shards: Path) -> None:
    made = batches_of(shards, ["data.repeats=3", "data.augment=[mixup]"])
    (micro,) = next(made.from_position(0, 0)).micro_batches
    labels, partners = micro.labels.own, micro.labels.partners  # type: ignore[union-attr]
    # Places 0 and 3, 1 and 4, ... of a batch of 32; the last two of 5 blocks of 6 have no partner.
    expected = [place + 3 if place % 6 < 3 else place - 3 for place in range(30)] + [30, 31]
    assert partners.tolist() == labels[expected].tolist()
    assert (micro.sample_ids[expected] == micro.sample_ids).tolist() == [False] * 30 + [True] * 2
