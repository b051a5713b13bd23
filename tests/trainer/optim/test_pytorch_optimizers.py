"""Optimizers of the package pytorch_optimizer: their options, what cannot work, and weights that are evaluated as others."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardstep.configs.components import resolve_options
from shardstep.configs.errors import InputError
from shardstep.trainer.optim.average import averaged, weights_to_evaluate
from shardstep.trainer.optim.optimizers import COMMON_OPTIONS, build_optimizer, optimizers_for
from tests.distributed import run_ranks
from tests.runs import failure_of, train_ranks, write_recipe

pytest.importorskip("pytorch_optimizer")
SCHEDULE_FREE = ("schedulefreesgd", "schedulefreeadamw", "schedulefreeradam")


def section(name: str, **options: Any) -> dict[str, Any]:
    full = f"pytorch_optimizer/{name}"
    resolved, problems = resolve_options("optimizer", {"name": full, **options}, optimizers_for(full), COMMON_OPTIONS)
    assert not problems
    return resolved


def trained(options: dict[str, Any], steps: int = 8) -> Any:
    """A state, as far as averages look at it, after some steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = build_optimizer(options, net)
    for _ in range(steps):
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(module=net, optimizer=SimpleNamespace(optimizer=optimizer), average=None)


@pytest.mark.parametrize("name", ["lion", "adan", "came", "soap", "sgdp"])
def test_others_optimizers_step(name: str) -> None:
    before, after = (trained(section(name, lr=0.01), steps).module[0].weight for steps in (0, 3))
    assert not torch.equal(before, after)


def test_options_are_checked() -> None:
    _, problems = resolve_options(
        "optimizer",
        {"name": "pytorch_optimizer/lion", "beta": 3},
        optimizers_for("pytorch_optimizer/lion"),
        COMMON_OPTIONS,
    )
    assert "optimizer.beta is not an option of pytorch_optimizer/lion; did you mean betas" in problems[0]
    _, problems = resolve_options(
        "optimizer", {"name": "pytorch_optimizer/lyon"}, optimizers_for("pytorch_optimizer/lyon")
    )
    assert "did you mean pytorch_optimizer/lion" in problems[0]


@pytest.mark.parametrize("groups", [[], [{"match": "1.*", "name": "sgd", "lr": 0.1}]])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_averaged_weights_are_evaluated_and_those_of_training_come_back(name: str, groups: list[dict]) -> None:
    state = trained(section(name, lr=0.1, groups=groups))
    training = copy.deepcopy(state.module.state_dict())
    other = trained(section(name, lr=0.1, groups=groups))
    other.optimizer.optimizer.eval()
    wanted = other.module.state_dict()
    assert not torch.equal(wanted["0.weight"], training["0.weight"])
    with averaged(state):
        assert all(torch.equal(value, wanted[key]) for key, value in state.module.state_dict().items())
    assert all(torch.equal(value, training[key]) for key, value in state.module.state_dict().items())
    evaluated = weights_to_evaluate(state)
    assert evaluated is not None
    assert all(torch.equal(evaluated[key], wanted[key]) for key in wanted)


def test_checkpoints_and_results_have_the_averaged_weights(shards: Path, tmp_path: Path) -> None:
    optimizer = {"name": "pytorch_optimizer/schedulefreesgd", "lr": 0.5}
    train_ranks(2, write_recipe(tmp_path, shards, optimizer=optimizer))
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    final = load_file(tmp_path / "run" / "model.safetensors")
    averages, training = load_file(checkpoint / "average.safetensors"), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(final[key], averages[key]) for key in final)
    assert not torch.equal(final["1.weight"], training["1.weight"])


@pytest.mark.parametrize(("name", "message"), [
    ("lbfgs", "optimizer.name=pytorch_optimizer/lbfgs cannot work here"),
    ("adahessian", "optimizer.name=pytorch_optimizer/adahessian cannot work here"),
    ("alig", "it has no learning rate, which the schedule would set"),
    ("muon", "`use_muon` must be set"),
    ("lomo", "optimizer.name=pytorch_optimizer/lomo"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(shards: Path, tmp_path: Path, name: str, message: str) -> None:
    recipe = write_recipe(tmp_path, shards, optimizer={"name": f"pytorch_optimizer/{name}"})
    ((code, _, errors),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(InputError, match=r"pip install 'shardstep\[pytorch-optimizer\]'"):
        optimizers_for("pytorch_optimizer/lion")
