"""Training on a GPU: number formats, compiled steps, gradients over NCCL, exact resume, memory that runs out, no waiting."""

import gzip
import json
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardstep.launch.ranks import TRAIN_SCRIPT
from tests.distributed import HANG_S, run_command, run_ranks
from tests.runs import failure_of, train_lines, write_recipe
from tests.trainer.checkpoints.test_checkpoint import break_all_off, logged, train_all
from tests.trainer.distributed.test_gradients import build_run

pytestmark = pytest.mark.gpu

CONVOLUTIONS: dict[str, Any] = {"name": "whitening_cnn", "widths": [8, 8]}
MLP: dict[str, Any] = {"name": "mlp", "hidden": [16]}
MOMENTUM: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


def recipe_for(device: str, folder: Path, shards: Path, train: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A small recipe for a device, in channels_last; an mlp with SGD in fp32 unless the arguments say otherwise."""
    train = {"device": device, "memory_format": "channels_last"} | (train or {})
    return write_recipe(folder, shards, train=train, **sections)


def train(recipe: Path, *overrides: str) -> str:
    """Train as a person would, without a launcher; returns what was printed."""
    result = run_command("train", str(recipe), *overrides, cwd=recipe.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in train_lines(folder / "run")]


# --- number formats ---------------------------------------------------------------------------------------------------

FORMATS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16 with a scaler": {"precision": "fp16"},
    "bf16 weights": {"precision": "bf16", "weights": "half"},
    "fp16 weights": {"precision": "fp16", "weights": "half"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_format_learns(name: str, device: str, shards: Path, tmp_path: Path) -> None:
    chosen = FORMATS[name]
    model = MLP if (device, chosen["precision"]) == ("cpu", "fp16") else CONVOLUTIONS  # a CPU convolves slowly in fp16
    recipe = recipe_for(device, tmp_path, shards, chosen | {"duration": "8 epochs"}, model=model, optimizer=MOMENTUM)
    train(recipe)
    found = losses(tmp_path)
    assert min(found) == min(found)  # no NaN
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["precision"]) == (device, chosen["precision"])
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-*32/state.json")
    scaler = json.loads(state.read_text())["scaler"]
    assert bool(scaler) == (name == "fp16 with a scaler")
    if scaler:
        assert scaler["scale"] >= 1


# --- compiled steps ---------------------------------------------------------------------------------------------------


def graph_launches(trace: Path) -> int:
    """How many CUDA graphs a profile has seen being launched."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "cudaGraphLaunch" for event in events)


@pytest.mark.parametrize(("mode", "has_graphs"), [("default", False), ("reduce-overhead", True)])
def test_a_compiled_step_is_the_same(mode: str, has_graphs: bool, device: str, shards: Path, tmp_path: Path) -> None:
    """With CUDA graphs where the mode has them. 101 images are one batch, so that one shape is compiled."""
    if device == "cpu" and has_graphs:
        pytest.skip("a CPU has no CUDA graphs")
    model = CONVOLUTIONS if device == "cuda" else MLP  # for which a C++ compiler takes long
    for compiled in ("none", mode):
        chosen = {"global_batch_size": 101, "duration": "6 steps", "compile": compiled}
        recipe = recipe_for(device, tmp_path / compiled, shards, chosen, model=model, optimizer=MOMENTUM)
        train(recipe, "train.profile=step 5")
    assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "none"), rel=1e-2)  # convolutions in TF32
    for compiled, expected in (("none", False), (mode, has_graphs)):
        trace = tmp_path / compiled / "run" / "profile" / "trace-rank0.json.gz"
        assert bool(graph_launches(trace)) == expected, compiled


# --- gradients of several ranks ---------------------------------------------------------------------------------------


def flat_gradients(device: str) -> tuple[float, int]:
    """Runs in a rank: the largest difference of gradients from torch's own, and how many addresses each has had."""
    warnings.simplefilter("default")  # the compiler's advice
    from shardstep.configs.schema import TrainConfig
    from shardstep.trainer.distributed import ddp
    from shardstep.trainer.distributed.gradients import FlatGradients
    from shardstep.trainer.distributed.world import start_world

    place = start_world(TrainConfig(device=device)).device  # type: ignore[arg-type]
    torch.backends.cudnn.allow_tf32 = False
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).to(place)
    module = module.to(memory_format=torch.channels_last)
    with_graphs = device == "cuda"
    model = FlatGradients(
        torch.compile(module, mode="reduce-overhead", dynamic=False) if with_graphs else module,  # type: ignore[arg-type]
        partial(ddp._average, sent_as=None),
    )
    images = torch.randn(16, 3, 8, 8, device=place).contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(module(images).square().sum(), list(module.parameters()))
    addresses, largest = set(), 0.0
    for step in range(6):
        model(images).square().sum().backward()
        if step == 0:
            model.lay_out()
            continue
        model.average_gradients()
        for value, wanted in zip(module.parameters(), expected, strict=True):
            assert value.grad is not None
            largest = max(largest, ((value.grad - wanted).norm() / wanted.norm()).item())
        addresses.add(tuple(value.grad.data_ptr() for value in module.parameters() if value.grad is not None))
        model.zero_grad()
    return largest, len(addresses)


def test_a_flat_buffer_keeps_its_place_beside_cuda_graphs(device: str) -> None:
    """One rank, whose all-reduce goes over NCCL all the same."""
    ((largest, addresses),) = run_ranks(1, flat_gradients, device)
    assert largest < 1e-5
    assert addresses == 1


@pytest.mark.parametrize("all_reduce", ["buckets", "flat"])
def test_as_many_ranks_as_cards_train_alike(all_reduce: str, device: str, shards: Path, tmp_path: Path) -> None:
    """torchrun and NCCL against a single process; one card is one rank."""
    ranks = torch.cuda.device_count() or 2
    for name in ("alone", "ranks"):
        recipe_for(device, tmp_path / name, shards, {"all_reduce": all_reduce, "duration": "12 steps"})
    train(tmp_path / "alone" / "recipe.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(TRAIN_SCRIPT), str(tmp_path / "ranks" / "recipe.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{ranks} rank" in result.stdout
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


# --- exact resume -----------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "an mlp with dropout, fp32": {"model": MLP | {"dropout": 0.2}},
    "convolutions, fp32": {"model": CONVOLUTIONS},
    "convolutions, bf16": {"model": CONVOLUTIONS, "train": {"precision": "bf16"}},
    "an mlp, fp16 with a scaler": {"train": {"precision": "fp16"}},
    "convolutions, bf16 weights": {"model": CONVOLUTIONS, "train": {"precision": "bf16", "weights": "half"}},
    "streamed and augmented": {"model": CONVOLUTIONS, "data": {"mode": "stream", "augment": ["flip"]}},
    "mixed": {"model": CONVOLUTIONS, "data": {"augment": ["trivial_augment", "erasing", "mixup", "cutmix"]}},
}


@pytest.fixture(scope="module")
def resumed(device: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each case of RESUMED by number: whole, and cut after step 7, between two checkpoints. Read only."""
    folder = tmp_path_factory.mktemp("resumed")
    recipes: dict[str, list[str]] = {"whole": [], "cut": []}
    for number, case in enumerate(RESUMED.values()):
        for name in recipes:
            sections = {"optimizer": MOMENTUM, "checkpoint": {"every": "3 steps"}} | case
            sections["train"] = {"duration": "11 steps"} | case.get("train", {})
            recipes[name].append(str(recipe_for(device, folder / str(number) / name, shards, **sections)))
    run_ranks(1, train_all, recipes["whole"])
    run_ranks(1, break_all_off, recipes["cut"], 7)
    run_ranks(1, train_all, recipes["cut"])
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise_in_the_same_configuration(name: str, resumed: Path) -> None:
    whole, cut = (resumed / str(list(RESUMED).index(name)) / part / "run" for part in ("whole", "cut"))
    assert json.loads((cut / "summary.json").read_text())["restarts"] == 1
    assert logged(cut) == logged(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# --- evaluation, memory, waiting --------------------------------------------------------------------------------------


def test_evaluation_counts_every_sample_once(device: str, shards: Path, tmp_path: Path) -> None:
    """53 images in batches of 8, counted on the device and on the CPU."""
    recipe = recipe_for(device, tmp_path, shards, {"duration": "8 steps"}, eval={"batch_size": 8})
    train(recipe)
    found = []
    for where in (device, "cpu"):
        result = run_command("evaluate", str(tmp_path / "run"), "--device", where, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout.splitlines()[-1]))
    on_device, on_cpu = found
    assert on_device["samples"] == on_cpu["samples"] == 53
    assert (on_device["accuracy"], on_device["top5"]) == (on_cpu["accuracy"], on_cpu["top5"])
    assert on_device["loss"] == pytest.approx(on_cpu["loss"], rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval"]["accuracy"] == on_device["accuracy"]


def run_out_of_memory(recipe: str, device: str) -> tuple[int, str, str]:
    """Runs in a rank: what a training step prints that needs more memory than there is."""
    warnings.simplefilter("default")
    if device == "cuda":
        allowed_bytes, all_bytes = 32 << 20, torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / all_bytes)
    else:
        from shardstep.trainer import loop

        loop.train_step = lambda run, batch: torch.empty(10**15)
    return failure_of(recipe)


def test_memory_that_runs_out_is_one_clear_message(device: str, shards: Path, tmp_path: Path) -> None:
    # 101 images: 24 channels of 31 x 31 and 64 of 31 x 31, several times 25 MB
    model = CONVOLUTIONS | {"widths": [64, 64]}
    recipe = recipe_for(device, tmp_path, shards, {"global_batch_size": 101}, model=model)
    ((code, _, error),) = run_ranks(1, run_out_of_memory, str(recipe), device)
    assert code == 1
    message, remedy = [line for line in error.splitlines() if "warning" not in line.lower()][-2:]
    assert message.startswith("failed: ")
    assert "memory" in message
    assert remedy == "a smaller train.max_micro_batch, eval.batch_size or data.resize needs less memory"
    assert "Traceback" not in error


def waits_of_steps(recipe: str, device: str) -> list[list[str]]:
    """Runs in a rank: for each of some steps, what torch says of its waiting for the GPU."""
    from shardstep.trainer import loop

    run, found = build_run(recipe), []
    batches = run.batches.from_position(0, 0)
    for _ in range(6):
        batch = next(batches)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            loop.train_step(run, batch)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append(
            [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing CUDA" in str(one.message)]
        )
    return found


@pytest.mark.parametrize(
    ("name", "train"),
    [("bf16", {"precision": "bf16"}), ("half weights", {"precision": "fp16", "weights": "half"}), ("fp32", {})],
)
def test_no_step_waits_for_the_gpu(name: str, train: dict[str, Any], device: str, shards: Path, tmp_path: Path) -> None:
    """The first step may: it creates the optimizer's state. fp16 with a scaler has to, it asks for overflows."""
    model = MLP if (device, name) == ("cpu", "half weights") else CONVOLUTIONS
    recipe = recipe_for(device, tmp_path, shards, train | {"duration": "9 steps"}, model=model, optimizer=MOMENTUM)
    ((_, *later),) = run_ranks(1, waits_of_steps, str(recipe), device)
    assert later == [[]] * 5
