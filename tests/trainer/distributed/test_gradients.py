"""How ranks share gradients: one flat buffer or DDP's buckets, compressed or not; and again when parameters are frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed.gradients import FlatGradients, bucket_mb, gradient_bytes, graphs_problem
from shardstep.trainer.validate_recipe import validate_recipe
from tests.distributed import run_ranks
from tests.runs import failure_of, train_lines, train_ranks, train_until, write_recipe
from tests.trainer.distributed.test_world import BESIDE_ONE, curves, largest_difference

FLAT = {"all_reduce": "flat"}
WIDE = {"name": "mlp", "hidden": [64, 512, 512, 512, 16]}  # 0.75, 0.13, 1, 1, 0.03 and 0.001 MiB of gradients


@pytest.mark.parametrize(
    ("mode", "all_reduce", "device_type", "world_size", "micro_steps", "told"),
    [
        ("max-autotune", "buckets", "cuda", 1, 1, ""),
        ("max-autotune", "buckets", "cuda", 2, 1, "train.all_reduce=flat"),
        ("reduce-overhead", "flat", "cuda", 2, 1, ""),
        ("reduce-overhead", "flat", "cuda", 2, 3, "train.max_micro_batch"),
        ("reduce-overhead", "buckets", "cuda", 1, 3, "train.max_micro_batch"),
        ("default", "buckets", "cuda", 2, 3, ""),
        ("max-autotune", "buckets", "cpu", 2, 3, ""),  # a CPU has no graphs
    ],
)
def test_cuda_graphs_are_left_where_they_would_fail(
    mode: Any, all_reduce: Any, device_type: str, world_size: int, micro_steps: int, told: str
) -> None:
    config = TrainConfig(compile=mode, all_reduce=all_reduce)
    problem = graphs_problem(config, device_type, world_size, micro_steps)
    assert told in problem
    assert bool(told) == bool(problem)


# --- one flat buffer, without ranks -----------------------------------------------------------------------------------


def test_gradients_are_parts_of_one_buffer_that_stays_in_its_place() -> None:
    averaged: list[torch.Tensor] = []
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)).to(memory_format=torch.channels_last)
    module.register_parameter("unused", nn.Parameter(torch.ones(5)))
    model = FlatGradients(module, averaged.append)
    images = torch.randn(6, 2, 3, 3)
    for _ in range(2):  # what the first pass laid out makes way
        model(images).sum().backward()
        model.lay_out()
    addresses = set()
    for _ in range(2):
        expected = torch.autograd.grad(model(images).square().sum(), [*module[0].parameters(), *module[2].parameters()])
        model(images[:2]).square().sum().backward()  # in two micro-steps
        model(images[2:]).square().sum().backward()
        model.average_gradients()
        found = [value.grad for value in module.parameters() if value.grad is not None]
        addresses.add(tuple(value.data_ptr() for value in found))
        for gradient, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, reference)
        model.zero_grad()
    assert module.unused.grad is None  # an optimizer must not see zeros there: it would decay it
    assert len(addresses) == 1
    assert len({values.data_ptr() for values in averaged}) == 1
    assert len(averaged) == 2
    assert averaged[0].shape == (4 * 2 * 9 + 4 + 3 * 4 + 3,)
    assert module[0].weight.stride() == (18, 1, 6, 2)  # channels_last: (C H W, 1, W C, C)
    model(images).sum().backward()
    assert module[0].weight.grad is not None
    assert module[0].weight.grad.stride() == (18, 1, 6, 2)


def test_one_buffer_for_each_number_format() -> None:
    averaged: list[torch.Tensor] = []
    model = FlatGradients(nn.Sequential(nn.Linear(2, 3).double(), nn.Linear(3, 1).double()), averaged.append)
    model.module[1].weight.data = model.module[1].weight.data.float()
    model.module[1].forward = lambda x: nn.functional.linear(x, model.module[1].weight.double())
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    model.lay_out()
    model.average_gradients()
    assert [(values.dtype, values.numel()) for values in averaged] == [(torch.float64, 9), (torch.float32, 3)]


def test_small_nets_have_small_buckets() -> None:
    assert bucket_mb(1_200_000, "none") == 1  # the article's net
    assert bucket_mb(102_000_000, "bf16") == 25  # ResNet-50
    assert bucket_mb(102_000_000, "powersgd") == 98  # all of it: 97.3 MiB


# --- the same curve ---------------------------------------------------------------------------------------------------


@BESIDE_ONE
def test_a_flat_buffer_gives_the_same_curve(shards: Path, tmp_path: Path, worlds: list[int]) -> None:
    # 101 samples in batches of 25: the fifth has one sample, so that ranks have empty shares; micro-batches of 3
    train = {"duration": "26 steps", "global_batch_size": 25, "max_micro_batch": 3}
    convolutions = {"model": {"name": "article_cnn", "dropout": 0.0}}
    cases: dict[str, dict[str, Any]] = {
        "momentum": {"optimizer": {"name": "sgd", "lr": 0.003, "momentum": 0.9}, "train": train | FLAT},
        "convolutions": convolutions | {"train": train | FLAT | {"memory_format": "channels_last", "clip_norm": 0.5}},
    }
    plain = {name: case | {"train": case["train"] | {"all_reduce": "buckets"}} for name, case in cases.items()}
    reference = curves(tmp_path / "plain", shards, 1, plain)
    for world in worlds:
        found = curves(tmp_path, shards, world, cases)
        for name in cases:
            assert len(found[name]) == 26
            assert largest_difference(reference[name], found[name]) < 1e-5, (name, world)


# The largest relative difference of a step's loss from the uncompressed one: numbers of 8 and 11 bits are rounded by 2^-9
# and 2^-12, 0.2 % and 0.02 %, of which each of 25 steps of this net passes on a part.
TOLERANCE = {"bf16": 5e-3, "fp16": 5e-4}


@pytest.mark.parametrize("all_reduce", ["buckets", "flat"])
def test_compressed_gradients_stay_near_the_curve(shards: Path, tmp_path: Path, all_reduce: str) -> None:
    train = {"duration": "25 steps", "max_micro_batch": 7, "all_reduce": all_reduce}
    formats = ("none", "bf16", "fp16")
    cases = {name: {"train": train | {"compress": name}} for name in formats}
    found = curves(tmp_path, shards, 2, cases)
    assert found["none"][-1] < 0.9 * found["none"][0]
    for name, tolerance in TOLERANCE.items():
        assert 1e-7 < largest_difference(found["none"], found[name]) < tolerance, name  # and is not the same


def test_powersgd_learns(shards: Path, tmp_path: Path) -> None:
    cases = {
        name: {"model": WIDE, "train": {"duration": "12 steps", "compress": name}} for name in ("none", "powersgd")
    }
    found = curves(tmp_path, shards, 2, cases)
    assert found["powersgd"][0] == found["none"][0]
    assert found["powersgd"][-1] != found["none"][-1]
    assert found["powersgd"][-1] < found["none"][0] - 0.5 * (found["none"][0] - found["none"][-1])


# --- collectives, counted ---------------------------------------------------------------------------------------------


def build_run(recipe: str) -> Any:
    """Runs in a rank."""
    from shardstep.trainer import setup
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.monitoring.display import Display

    checked = validate_recipe(load_recipe(recipe))
    run = setup.build(start_world(checked.train), checked, Display(enabled=False))
    run.metrics.close()
    return run


def take_steps(run: Any, count: int) -> list[int]:
    """Runs in a rank: the number of all-reduces of each step."""
    from torch.profiler import ProfilerActivity, profile

    from shardstep.trainer import loop

    batches, found = run.batches.from_position(0, 0), []
    for _ in range(count):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            batch = next(batches)
            loop.train_step(run, batch)
        found.append(sum(event.name == "gloo:all_reduce" for event in profiled.events()))
    return found


def count_reductions(recipe: str, count: int) -> list[int]:
    """Runs in a rank."""
    return take_steps(build_run(recipe), count)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"all_reduce": "flat"}, 1),
        ({"all_reduce": "flat", "compress": "bf16", "max_micro_batch": 5}, 1),
        # gradients come from the last layer to the first: 0.001 + 0.03 + 1 MiB, then 1, then 0.13 + 0.75
        ({"max_micro_batch": 5}, 3),
        ({"compress": "fp16"}, 3),
    ],
)
def test_reductions_of_a_step(shards: Path, tmp_path: Path, train: dict[str, Any], expected: int) -> None:
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    for counted in run_ranks(2, count_reductions, str(recipe), 3):
        assert counted == [expected] * 3


def count_bytes(recipe: str, count: int) -> tuple[list[int], list[int], int]:
    """Runs in a rank: the all-reduces of some steps, the bytes of each, and those of the gradients."""
    import torch.distributed as dist

    run, found, all_reduce = build_run(recipe), [], dist.all_reduce

    def counted(values: torch.Tensor, *options: Any) -> Any:
        found.append(values.nbytes)
        return all_reduce(values, *options)

    dist.all_reduce = counted
    return take_steps(run, count), found, gradient_bytes(run.state.module)


@pytest.mark.drill
def test_a_compiled_step_shares_each_gradient_once(shards: Path, tmp_path: Path) -> None:
    # 101 samples: 25 a rank, 25, and 1 on the first rank alone, so that it compiles two shapes, and the other one
    recipe = write_recipe(tmp_path, shards, train={"all_reduce": "flat", "compile": "default", "global_batch_size": 50})
    for counted, sizes, gradients in run_ranks(2, count_bytes, str(recipe), 3):
        assert counted == [1] * 3
        assert sizes == [gradients] * 3


# --- parameters that are frozen on the way -----------------------------------------------------------------------------


def freeze_on_the_way(recipe: str) -> tuple[list[int], list[list[float]], bool]:
    """Runs in a rank: a step, and one after the first layer is frozen.

    Returns:
        The all-reduces of both, by how much the second one moved each parameter, whether autocast is there, and once.
    """
    from shardstep.trainer import model_setup

    run = build_run(recipe)
    module, still_held = run.state.module, run.state.model
    counted = take_steps(run, 1)
    for value in module[1].parameters():
        value.requires_grad_(False)
    model_setup.wrap_model(run.accelerator, run.recipe, run.state, run.objective, run.data, run.plan)
    before = [value.detach().clone() for value in module.parameters()]
    counted += take_steps(run, 1)
    moved = [(value - old).flatten().tolist() for value, old in zip(module.parameters(), before, strict=True)]
    del still_held  # whoever kept the first wrapper did no harm
    inner = module.__dict__.get("_original_forward")
    return counted, moved, inner is not None and inner.__func__ is type(module).forward


@pytest.mark.parametrize(("all_reduce", "expected"), [("buckets", 3), ("flat", 1)])
def test_parameters_can_be_frozen_on_the_way(shards: Path, tmp_path: Path, all_reduce: str, expected: int) -> None:
    recipe = write_recipe(
        tmp_path, shards, model=WIDE, optimizer={"name": "sgd", "lr": 0.5}, train={"all_reduce": all_reduce}
    )
    ((_, reference, _),) = run_ranks(1, freeze_on_the_way, str(recipe))
    for counted, moved, _ in run_ranks(2, freeze_on_the_way, str(recipe)):
        assert counted == [expected] * 2  # both wrappers would reduce if the first were still there
        for place, (found, wanted) in enumerate(zip(moved, reference, strict=True)):
            assert any(wanted) == (place > 1)  # weights and biases of the first layer stay
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_is_put_on_once(shards: Path, tmp_path: Path, precision: str) -> None:
    recipe = write_recipe(tmp_path, shards, train={"all_reduce": "flat", "precision": precision})
    assert [once for _, _, once in run_ranks(2, freeze_on_the_way, str(recipe))] == [True, True]


def wrap_other_weights(all_reduce: str) -> tuple[list[float], list[float]]:
    """Runs in a rank: the weights of a model that differs between ranks, and batch norm's mean after it is wrapped again."""
    from shardstep.configs.schema import TrainConfig
    from shardstep.trainer.distributed.ddp import wrap_for_training
    from shardstep.trainer.distributed.world import build_accelerator, start_world

    config = TrainConfig(device="cpu", all_reduce=all_reduce)  # type: ignore[arg-type]
    rank = start_world(config).process_index
    norm = nn.BatchNorm1d(2)
    module = nn.Sequential(nn.Linear(2, 2, bias=False), norm)
    nn.init.constant_(module[0].weight, rank + 1)
    nn.init.constant_(norm.running_mean, rank + 3)
    accelerator = build_accelerator("fp32")
    batches = [torch.ones(2, 2)]

    def loss_of(outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return outputs.sum()

    model = wrap_for_training(accelerator, module, config, loss_of, batches, before=module)
    first = [*module[0].weight.flatten().tolist(), *norm.running_mean.tolist()]
    norm.running_mean.fill_(rank + 5)
    module[0].weight.requires_grad_(False)
    wrap_for_training(accelerator, module, config, loss_of, batches, before=model)
    return first, norm.running_mean.tolist()


@pytest.mark.parametrize("all_reduce", ["buckets", "flat"])
def test_all_ranks_begin_with_the_weights_of_rank_0_and_keep_their_own_statistics(all_reduce: str) -> None:
    ranks = run_ranks(2, wrap_other_weights, all_reduce)
    assert [first for first, _ in ranks] == [[1.0, 1.0, 1.0, 1.0, 3.0, 3.0]] * 2
    assert [later for _, later in ranks] == [[5.0, 5.0], [6.0, 6.0]]


def wrapper_of(recipe: str) -> str:
    """Runs in a rank: the class of the wrapped model."""
    return type(build_run(recipe).state.model).__name__


@pytest.mark.parametrize(
    ("all_reduce", "world_size", "wrapper"),
    [
        ("buckets", 1, "Sequential"),  # as without a launcher: DDP would keep CUDA graphs from the step
        ("flat", 1, "Sequential"),
        ("buckets", 2, "DistributedDataParallel"),
        ("flat", 2, "FlatGradients"),
    ],
)
def test_what_wraps_the_model(shards: Path, tmp_path: Path, all_reduce: str, world_size: int, wrapper: str) -> None:
    recipe = write_recipe(tmp_path, shards, train={"all_reduce": all_reduce})
    assert run_ranks(world_size, wrapper_of, str(recipe)) == [wrapper] * world_size


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [{"all_reduce": "flat"}, {"all_reduce": "flat", "compress": "bf16"}, {}])
def test_a_resumed_run_is_the_same_to_the_last_bit(shards: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    sections: dict[str, Any] = {
        "model": WIDE,
        "optimizer": {"name": "adam", "lr": 0.001},
        "train": train | {"max_micro_batch": 6},
        "checkpoint": {"every": "3 steps", "keep": 1},
    }
    train_ranks(3, write_recipe(tmp_path / "whole", shards, **sections))
    interrupted = write_recipe(tmp_path / "cut", shards, **sections)
    run_ranks(3, train_until, str(interrupted), 5)
    train_ranks(3, interrupted)
    first, second = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_powersgd_says_that_it_begins_anew(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, shards, train={"compress": "powersgd", "duration": "4 steps"}, checkpoint={"every": "2 steps"}
    )
    run_ranks(2, train_until, str(recipe), 3)
    (code, output, message), (_, _, silence) = run_ranks(2, failure_of, str(recipe))
    assert code == 0
    assert "all-reduced in buckets of 1 MiB, sent as powersgd" in output
    assert "train.compress=powersgd starts over" in message
    assert silence == ""


def test_another_compression_is_another_run(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "2 steps"})
    train_ranks(1, recipe)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), "train.compress=bf16", "train.all_reduce=flat")
    assert code == 2
    assert "train.compress: none -> bf16" in message
    assert "all_reduce" not in message  # adds up in another order, as another number of ranks does


# --- what has no effect, or cannot work ---------------------------------------------------------------------------------


def test_one_rank_has_nobody_to_share_with(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps"})
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), "train.compress=powersgd", "train.all_reduce=flat")
    assert code == 2
    assert "train.compress=powersgd compresses DDP's buckets" in message
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), "train.compress=bf16", "train.all_reduce=flat")
    assert code == 0
    assert "train.compress=bf16 has no effect with one rank" in message
    assert "train.all_reduce=flat has no effect with one rank" in message
    assert len(train_lines(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.all_reduce=flat", "which train.all_reduce=flat does not have"),
        ("train.on_nan=skip", "train.on_nan=skip could not skip a bad step"),
        ("train.precision=fp16", "the first overflow of train.precision=fp16 would spoil"),
    ],
)
def test_powersgd_remembers_and_is_refused_where_that_spoils_it(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        validate_recipe(load_recipe("smoke", ["train.compress=powersgd", override]))


@pytest.mark.parametrize("override", ["train.compress=fp8", "train.all_reduce=ring"])
def test_other_names_are_refused(override: str) -> None:
    with pytest.raises(InputError, match=override.split("=")[1]):
        validate_recipe(load_recipe("smoke", [override]))
