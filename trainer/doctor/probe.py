"""Measurements before a run: matrix products, all-reduces, and one optimizer step of the recipe with the real code."""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import with_keys
from shardstep.configs.schema import Recipe
from shardstep.datasets.write import write_shards
from shardstep.trainer import loop, setup
from shardstep.trainer.data import missing_sets
from shardstep.trainer.distributed.collectives import time_all_reduce
from shardstep.trainer.doctor.findings import Speed
from shardstep.trainer.monitoring.display import Display

ALL_REDUCE_BYTES = 4_000_000
_REPEATS = 5
_ENOUGH_S = 0.3  # of matrix products, so that the best of them is undisturbed
_SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices: some milliseconds each


@dataclass(frozen=True)
class Step:
    """The first optimizer step of a recipe: its time after `setup_s` of setup, and what a checkpoint and the GPU need.

    `measured`: what its compute format was chosen by; None if there was no choice, and nobody asked to measure.
    """

    setup_s: float
    samples: int
    seconds: float
    precision: str
    memory_format: str
    measured: str | None
    parameters: int
    checkpoint_bytes: int
    gpu_peak_bytes: int | None


def measure_speed(world: PartialState) -> Speed:
    """Measure matrix products, on all ranks at the same time, and the all-reduce of 4 MB. All ranks call it."""
    fp32, bf16 = (_matrix_product(world.device, dtype) for dtype in (torch.float32, torch.bfloat16))
    if world.num_processes == 1:
        return Speed(fp32, bf16)
    seconds = statistics.median(time_all_reduce(world, ALL_REDUCE_BYTES, _REPEATS))
    return Speed(fp32, bf16, ALL_REDUCE_BYTES / 1e6 / seconds)


def _matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return GFLOP/s, the best of several products."""
    side, seconds = _SIDE[device.type], [0.0]
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    while sum(seconds) < _ENOUGH_S:
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:]) / 1e9


def take_step(world: PartialState, recipe: Recipe, folder: Path, measure_anew: bool) -> Step:
    """Build the recipe's run in an empty folder, a different one per rank, and take one optimizer step. All ranks call it.

    Streams the shards, so that nothing is decoded into the cache. A synthetic set that does not exist is written to `folder`.
    `measure_anew`: see setup.build.

    Raises:
        InputError: the run cannot be built, its step runs out of memory, or its loss is NaN or infinite.
    """
    data: dict[str, object] = {"mode": "stream"}
    for split, shards in missing_sets(recipe.data).items():
        if (recipe.data.source or "").startswith("synthetic:") and not Path(shards).exists():
            write_shards(str(recipe.data.source), split, folder / split)
            data[split] = str(folder / split)
    recipe = with_keys(
        recipe,
        data=data,
        run={"dir": str(folder / "run"), "resume": "never", "allow_changes": [], "hang_timeout": None},
        log={"wandb": "disabled", "tensorboard": False, "sample_keys": False},
    )
    began = time.perf_counter()
    run = setup.build(world, recipe, Display(enabled=False), measure_anew=measure_anew)
    state, setup_s = run.state, time.perf_counter() - began

    began = time.perf_counter()
    batch = next(iter(run.batches.from_position(0, 0)))
    try:
        sums = loop.train_step(run, batch)
    except torch.OutOfMemoryError as error:
        text = str(error).splitlines()[0].rstrip(".").replace(". ", "; ")
        raise InputError(f"the first step does not fit: {text}. Lower train.max_micro_batch") from None
    loss = None if sums is None else sums.tolist()[0]  # waits for the device
    seconds = time.perf_counter() - began
    if loss is None or not math.isfinite(loss):
        remedy = "Try a lower optimizer.lr, or train.precision=fp32"
        raise InputError(f"the loss of the first step is NaN or infinite. {remedy}")

    tensors = [*state.module.state_dict().values(), *_tensors(state.optimizer.state_dict()["state"])]
    on_gpu = world.device.type == "cuda"
    no_choice = "nothing to measure: the recipe, the run to be resumed or the device leaves one choice"
    return Step(
        setup_s=setup_s,
        samples=batch.size,
        seconds=seconds,
        precision=run.recipe.train.precision,
        memory_format=run.recipe.train.memory_format,
        measured=str(run.measured) if run.measured else no_choice if measure_anew else None,
        parameters=sum(parameter.numel() for parameter in state.module.parameters()),
        checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        gpu_peak_bytes=torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
    )


def _tensors(content: object) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]
