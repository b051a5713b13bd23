"""Guarantees 2 and 4: the same curve and exact evaluation for any number of ranks; guarantee 8: never N worlds of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shardstep.configs.errors import InputError
from shardstep.trainer.distributed.launch_env import check_launch
from shardstep.trainer.distributed.world import check_world
from tests.distributed import run_ranks
from tests.runs import read_lines, train_lines, train_ranks, write_recipe

WORLDS = [1, 2, 3, 4]
BESIDE_ONE = pytest.mark.parametrize("worlds", [[2], pytest.param([3, 4], marks=pytest.mark.drill)], ids=["2", "3-4"])
"""The numbers of ranks whose curves are compared with that of one rank."""
DOCUMENTS = {
    "sgd": {"name": "sgd", "lr": 0.05},
    "momentum": {"name": "sgd", "lr": 0.003, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.003, "momentum": 0.9, "nesterov": True},
    "adagrad": {"name": "adagrad", "lr": 0.01},
    "adadelta": {"name": "adadelta"},
    "rmsprop": {"name": "rmsprop", "lr": 0.001},
    "adam": {"name": "adam", "lr": 0.001},
}


def train_several(recipes: list[str]) -> None:
    """Runs in a rank: one recipe after another in one world, which saves starting a world for each."""
    from shardstep.configs.load import load_recipe
    from shardstep.trainer import loop, setup
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.monitoring.display import Display
    from shardstep.trainer.validate_recipe import validate_recipe

    for path in recipes:
        recipe = validate_recipe(load_recipe(path))
        run = setup.build(start_world(recipe.train), recipe, Display(enabled=False))
        loop.train(run)
        run.metrics.close()


def curves(folder: Path, shards: Path, world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Per-step losses of each case."""
    recipes = [write_recipe(folder / f"{name}-{world_size}", shards, **sections) for name, sections in cases.items()]
    run_ranks(world_size, train_several, [str(path) for path in recipes])
    return {name: [line["loss"] for line in train_lines(folder / f"{name}-{world_size}" / "run")] for name in cases}


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(one, other, strict=True))


@BESIDE_ONE
def test_the_same_curve_for_every_optimizer_of_the_documents(shards: Path, tmp_path: Path, worlds: list[int]) -> None:
    # 101 samples in batches of 30: 4 steps an epoch, the last of 11 samples; 7 a time: shares that no rank divides evenly
    cases = {
        name: {"optimizer": optimizer, "train": {"duration": "28 steps", "max_micro_batch": 7}}
        for name, optimizer in DOCUMENTS.items()
    }
    found = {world: curves(tmp_path, shards, world, cases) for world in (1, *worlds)}
    for name in cases:
        assert len(found[1][name]) == 28
        assert found[1][name][-1] < found[1][name][0], f"{name} does not learn"
        for world in worlds:
            assert largest_difference(found[1][name], found[world][name]) < 1e-5, (name, world)


CNN = {"name": "whitening_cnn", "widths": [8, 8]}
NO_NORM = {"name": "article_cnn", "dropout": 0.0}


LARGE_SETTINGS = ["convolutions", "winograd"]  # most of the time; test_gradients.py has convolutions on two ranks, too


@pytest.mark.parametrize("worlds", [[2], pytest.param([2, 3, 4], marks=pytest.mark.drill)], ids=["2", "2-4"])
def test_the_same_curve_for_other_settings(shards: Path, tmp_path: Path, worlds: list[int]) -> None:
    steps = {"train": {"duration": "26 steps", "global_batch_size": 13}}
    cases: dict[str, dict[str, Any]] = {
        "convolutions": steps | {"model": NO_NORM, "data": {"augment": ["flip", {"name": "translate", "pixels": 2}]}},
        "winograd": steps | {"model": NO_NORM, "train": steps["train"] | {"convolutions": "winograd"}},
        "schedule and clipping": {
            "schedule": {"name": "one_cycle"},
            "train": {"duration": "7 epochs", "clip_norm": 0.5},
        },
        "clipping by value": {"train": {"duration": "26 steps", "clip_value": 0.001}},
        "streamed": steps | {"data": {"mode": "stream", "workers": 2, "lanes": 3, "window_shards": 2}},
        "mixed": {
            "data": {"augment": ["randaugment", "mixup", "cutmix"]},
            "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
            "train": {"duration": "26 steps", "global_batch_size": 13, "max_micro_batch": 3},
        },
        "whole batch": {"train": {"duration": "25 steps", "global_batch_size": "full", "max_micro_batch": 16}},
        "last batch dropped": {"data": {"last_batch": "drop"}, "train": {"duration": "26 steps"}},
        "a sum, and parts frozen after a while": {
            "loss": {"name": "cross_entropy", "reduction": "sum"},
            "optimizer": {"name": "sgd", "lr": 0.002, "groups": [{"match": "1.*", "until": "0.5 epochs"}]},
            "train": {"duration": "26 steps", "global_batch_size": 13},
        },
        "parts that begin later, rates by depth": {
            "optimizer": {
                "name": "sgd",
                "lr": 0.05,
                "layer_decay": 0.5,
                "groups": [{"match": "1.*", "from": "1.5 epochs"}],
            },
            "train": {"duration": "26 steps", "global_batch_size": 13},
        },
        "lookahead": {"average": {"name": "lookahead", "every": "3 steps"}, "train": {"duration": "26 steps"}},
        "few samples a step": {"train": {"duration": "26 steps", "global_batch_size": 4}},
    }
    if worlds == [2]:
        cases = {name: case for name, case in cases.items() if name not in LARGE_SETTINGS}
    found = {world: curves(tmp_path, shards, world, cases) for world in (1, *worlds)}
    for name in cases:
        assert len(found[1][name]) >= 25
        for world in worlds:
            assert largest_difference(found[1][name], found[world][name]) < 1e-5, (name, world)


EMPTY_SHARES = pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.drill)])
"""101 samples in batches of 25: the fifth has one sample, so that all ranks but one have an empty share."""


@EMPTY_SHARES
def test_the_same_curve_for_the_documents_models(shards: Path, tmp_path: Path, world: int) -> None:
    train = {"duration": "10 steps", "global_batch_size": 25}
    cases: dict[str, dict[str, Any]] = {
        "convnet": {"model": {"name": "convnet", "dropout": 0, "feature_dropout": 0}, "loss": {"name": "nll"}},
        "perceptron": {"model": {"name": "perceptron"}, "loss": {"name": "perceptron"}},
        "recurrent": {"model": {"name": "recurrent", "cell": "gru", "hidden": 16}},
        "autoencoder": {"model": {"name": "autoencoder", "widths": [8, 4]}, "loss": {"name": "mse"}},
        "muon": {"optimizer": {"name": "sgd", "lr": 0.05, "groups": [{"ndim": 2, "name": "muon", "lr": 0.01}]}},
    }
    found = {
        size: curves(tmp_path, shards, size, {name: case | {"train": train} for name, case in cases.items()})
        for size in (1, world)
    }
    for name in cases:
        assert len(found[1][name]) == 10
        tolerance = 1e-2 if name == "muon" else 1e-5  # muon makes its update orthogonal in bf16
        assert largest_difference(found[1][name], found[world][name]) < tolerance, name


@EMPTY_SHARES
def test_torchvision_on_ranks_without_samples(shards: Path, tmp_path: Path, world: int) -> None:
    model = {"name": "torchvision/shufflenet_v2_x0_5", "sync_batch_norm": True}
    train = {"duration": "5 steps", "global_batch_size": 25}
    # a small lr: so deep a net multiplies the rounding of its sums at every step
    cases = {"sync": {"model": model, "optimizer": {"name": "sgd", "lr": 1e-4}, "train": train}}
    found = {size: curves(tmp_path, shards, size, cases)["sync"] for size in (1, world)}
    assert largest_difference(found[1], found[world]) < 1e-3


@BESIDE_ONE
def test_synchronised_batch_norm_gives_the_same_curve(shards: Path, tmp_path: Path, worlds: list[int]) -> None:
    cases = {
        "sync": {"model": CNN | {"sync_batch_norm": True}, "train": {"duration": "26 steps"}},
        "alone": {"model": CNN, "train": {"duration": "26 steps"}},
    }
    found = {world: curves(tmp_path, shards, world, cases) for world in (1, *worlds)}
    assert largest_difference(found[1]["sync"], found[1]["alone"]) < 1e-4  # on one rank it is torch's own
    for world in worlds:
        assert largest_difference(found[1]["sync"], found[world]["sync"]) < 1e-3, world
        assert largest_difference(found[1]["alone"], found[world]["alone"]) > 1e-3  # so that the test can fail


def test_ranks_agree_on_what_is_measured_on_one(shards: Path, tmp_path: Path) -> None:
    """Only rank 0 measures formats: batch norm over all ranks must not wait for the others there."""
    model = CNN | {"sync_batch_norm": True}
    recipe = write_recipe(tmp_path, shards, model=model, train={"precision": "auto", "memory_format": "auto"})
    train_ranks(2, recipe, "train.global_batch_size=13")  # the last batch of 10 has shares of 5, those of 13 of 6 and 7
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["memory_format"] in ("channels_last", "contiguous")


def test_empty_shares_with_batch_norm(shards: Path, tmp_path: Path) -> None:
    # 101 samples in batches of 33: the last one has 2 samples for 4 ranks
    recipe = write_recipe(tmp_path, shards, model=CNN | {"sync_batch_norm": True}, train={"global_batch_size": 33})
    train_ranks(4, recipe)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def norm_gradients() -> list[list[float]]:
    """Runs in a rank: outputs, gradients and running statistics of our batch norm over shares of one batch."""
    from accelerate import PartialState

    from shardstep.trainer.models.batch_norm import SyncBatchNorm2d

    world = PartialState(cpu=True)
    images = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    shares = [images[:4], images[4:4], images[4:]] if world.num_processes == 3 else [images]  # one rank has nothing
    share = shares[world.process_index].clone().requires_grad_()
    norm = SyncBatchNorm2d(3)
    outputs = norm(share)
    (outputs**3).sum().backward()
    assert share.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [
        outputs.flatten().tolist(),
        share.grad.flatten().tolist(),
        norm.running_mean.tolist(),
        norm.running_var.tolist(),
    ]


def test_batch_norm_over_ranks_is_batch_norm_over_the_batch() -> None:
    images = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = torch.nn.BatchNorm2d(3)
    outputs = norm(images)
    (outputs**3).sum().backward()
    ranks = run_ranks(3, norm_gradients)
    assert [value for rank in ranks for value in rank[0]] == pytest.approx(outputs.flatten().tolist(), abs=1e-5)
    assert images.grad is not None
    assert [value for rank in ranks for value in rank[1]] == pytest.approx(images.grad.flatten().tolist(), abs=1e-4)
    for rank in ranks:
        assert rank[2] == pytest.approx(norm.running_mean.tolist(), abs=1e-6)  # type: ignore[union-attr]
        assert rank[3] == pytest.approx(norm.running_var.tolist(), abs=1e-6)  # type: ignore[union-attr]


# --- the same samples, as files that can be checked from outside -------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "mode", "workers"), [(1, "resident", 0), (2, "stream", 2), (3, "stream", 0), (4, "resident", 0)]
)
def test_sample_logs_are_the_global_order(
    shards: Path, tmp_path: Path, world_size: int, mode: str, workers: int
) -> None:
    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.order import EpochOrder

    recipe = write_recipe(
        tmp_path,
        shards,
        data={"mode": mode, "workers": workers},
        log={"sample_keys": True},
        run={"dir": str(tmp_path / "run"), "seed": 4},
    )
    train_ranks(world_size, recipe)
    lines = [line for rank in range(world_size) for line in read_lines(tmp_path / "run" / f"samples-rank{rank}.jsonl")]
    opened = open_shards(shards / "train")
    expected = []
    for epoch in range(2):
        for position, sample in enumerate(EpochOrder(opened.samples_per_shard, 4, epoch).slice(0, 101).tolist()):
            expected.append((epoch, 4 * epoch + position // 30 + 1, position, opened.key(sample)))
    found = [(line["epoch"], line["step"], line["position"], line["key"]) for line in lines]
    assert sorted(found) == expected


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLDS)
def test_evaluation_is_exact(shards: Path, tmp_path: Path, world_size: int) -> None:
    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.reader import StreamReader
    from shardstep.trainer.models.mlp import mlp

    recipe = write_recipe(
        tmp_path, shards, loss={"name": "cross_entropy", "label_smoothing": 0.3}, eval={"batch_size": 5}
    )
    train_ranks(world_size, recipe)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())

    from safetensors.torch import load_file

    model = mlp((3, 32, 32), 10, hidden=(16,))
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    opened, train = open_shards(shards / "test"), open_shards(shards / "train").manifest
    pixels, labels = StreamReader(opened).read(opened.labels.argsort(kind="stable"))  # any order gives the same figures
    images = ((pixels / 255 - torch.tensor(train.mean)) / torch.tensor(train.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = model(images)
    assert summary["eval"]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert summary["eval"]["accuracy"] == pytest.approx((outputs.argmax(1) == labels).double().mean().item(), abs=1e-12)
    top5 = (outputs.topk(5).indices == labels.unsqueeze(1)).any(1).double().mean().item()
    assert summary["eval"]["top5"] == pytest.approx(top5, abs=1e-12)
    assert summary["world_size"] == world_size


# --- the world that was asked for -------------------------------------------------------------------------------------


def test_accelerate_cpu_launch_is_caught() -> None:
    with pytest.raises(InputError, match="starts only one process"):
        check_launch({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}, None)


def test_slurm_tasks_without_a_rank_are_caught() -> None:
    with pytest.raises(InputError, match="Slurm was asked for 4 tasks"):
        check_launch({"SLURM_NTASKS": "4"}, None)
    check_launch({"SLURM_NTASKS": "1"}, None)
    check_launch(
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "8"}, None
    )  # an agent per node
    alone = {"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    with pytest.raises(
        InputError, match="srun started 2 tasks"
    ):  # two torchruns of two ranks that know nothing of each other
        check_launch(alone | {"GROUP_WORLD_SIZE": "1"}, None)
    check_launch(alone | {"GROUP_WORLD_SIZE": "2"}, None)
    with pytest.raises(InputError, match="srun started 4 tasks"):
        check_launch({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "1"}, None)


def test_a_world_that_did_not_come_up_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="announced 2 ranks .WORLD_SIZE., but 1 came up"):
        check_world(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    check_world(SimpleNamespace(num_processes=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "wanted", "came"), [({}, 2, "1 rank came"), ({"RANK": "0", "WORLD_SIZE": "3"}, 2, "3 ranks came")]
)
def test_another_size_than_asked_for(environment: dict[str, str], wanted: int, came: str) -> None:
    with pytest.raises(InputError, match=f"train.world_size={wanted}, but {came} up"):
        check_launch(environment, wanted)


def raise_on_one_rank() -> str:
    """Runs in a rank: rank 1 has a problem."""
    from accelerate import PartialState

    from shardstep.trainer.distributed.collectives import raise_on_all_ranks

    world = PartialState(cpu=True)
    try:
        with raise_on_all_ranks(world):
            if world.process_index == 1:
                raise InputError("no such folder")
    except InputError as error:
        return str(error)
    return "nothing raised"


def test_a_problem_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(3, raise_on_one_rank) == ["rank 1: no such folder"] * 3


def test_config_is_written_with_its_choices_made(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"precision": "auto", "memory_format": "auto", "device": "auto"})
    train_ranks(2, recipe)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["precision"] in ("fp32", "bf16")
    assert config["train"]["memory_format"] == "contiguous"  # an mlp has no convolutions to choose a layout for
    assert config["train"]["device"] == "cpu" or torch.cuda.is_available()
    assert config["data"]["mode"] == "resident"
