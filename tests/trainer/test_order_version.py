"""The recipe's keys reach the order of the batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardstep.configs.load import load_recipe
from shardstep.configs.resolve import Choices, resolve
from shardstep.configs.schema import OrderVersion
from shardstep.datasets.batches import OrderConfig
from shardstep.trainer import data
from shardstep.trainer.optim.plan import make_plan
from shardstep.trainer.validate_recipe import validate_recipe


@pytest.mark.parametrize(("given", "version"), [("auto", 2), ("1", 1), ("2", 2)])
def test_the_order_is_that_of_the_recipe(shards: Path, given: str, version: OrderVersion) -> None:
    keys = ["run.seed=3", "data.lanes=4", "data.window_shards=2", f"data.order_version={given}"]
    sets = [f"data.train={shards / 'train'}", f"data.test={shards / 'test'}"]
    recipe = validate_recipe(load_recipe("smoke", [*sets, *keys]))
    chosen = data.choose_order_version(recipe.data)
    resolved = resolve(recipe, Choices("stream", "cpu", "fp32", "channels_last", "direct", chosen, 2))
    loaded = data.load(resolved.data, "stream", data.open_parts(resolved.data), torch.device("cpu"))
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    made = data.train_batches(resolved, accelerator, loaded, make_plan(resolved.train, 101, False, 1))
    assert made.order == OrderConfig([17] * 5 + [16], 3, 4, 2, version)
