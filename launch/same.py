"""Check that a recipe trains the same on any number of ranks, or on a CPU and a GPU: losses, gradients and weights.

    shardstep same RECIPE [section.key=value ...] --ranks 1,2,4 [--steps 25] [--tolerance T]
    shardstep same RECIPE [section.key=value ...] --devices cpu,cuda

Exit code 0 if no difference exceeds the tolerance, 1 otherwise.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import Device, Recipe
from shardstep.configs.text import count, table
from shardstep.launch.cli import BAD_INPUT, FAILED, run_script
from shardstep.launch.comparison.results import last_complaint
from shardstep.launch.ranks import TRAIN_SCRIPT
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.run_dir import RunDir

_TOLERANCES = {"fp32": 1e-5, "bf16": 0.2, "fp16": 0.2}
"""By precision: the relative differences of losses, gradient norms and weights that rounding explains after 25 steps."""
_GRADIENT_GAPS = {"bf16": "2e-3", "fp16": "3e-4"}
"""By precision: the relative difference of a batch's weight gradients from those of its halves, at the first step."""


@dataclass(frozen=True)
class World:
    """Where a run is trained: on a number of ranks, and on a device if devices are compared."""

    ranks: int
    device: str | None = None

    def __str__(self) -> str:
        return self.device or count(self.ranks, "rank")

    @property
    def label(self) -> str:
        """What differs from the other runs, as in the options."""
        return self.device or str(self.ranks)


@dataclass(frozen=True)
class Gap:
    """The largest relative differences of two runs, and the first step at which one exceeds the tolerance, if any."""

    loss: float
    grad_norm: float
    weights: float
    differs_at: int | None

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.grad_norm, self.weights)


def main(arguments: list[str]) -> int:
    """Train in each world and compare; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep same",
        description="Check that a recipe trains the same on any number of ranks, or on a CPU and a GPU.",
    )
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="such as model.dropout=0")
    add("--ranks", metavar="N,N,...", help="compare the first with all others (default: 1,2; with --devices 1)")
    add("--devices", metavar="cpu,cuda", help="compare these devices, on one number of ranks")
    add("--steps", type=int, default=25, help="optimizer steps to train (default: %(default)s)")
    by_precision = ", ".join(f"{value:g} in {precision}" for precision, value in _TOLERANCES.items())
    add("--tolerance", type=float, help=f"largest relative difference (default: {by_precision})")
    args = parser.parse_intermixed_args(arguments)
    worlds = _check(args)
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.problems:
        raise InputError.from_problems(f"recipe {recipe.source}", recipe.problems)
    overrides = [*args.overrides, *_overrides(recipe.recipe, args.steps)]
    with tempfile.TemporaryDirectory(prefix="shardstep-same-") as place:
        folders = {world: _train(args.recipe, overrides, world, Path(place)) for world in worlds}
        first, *others = worlds
        tolerance = args.tolerance or _TOLERANCES[RunDir(folders[first]).config.recipe.train.precision]
        gaps = {world: compare(folders[first], folders[world], tolerance) for world in others}
        rounding, reasons = _rounding(folders[first]), _reasons(folders[first], by_device=bool(args.devices))
    what = "device" if args.devices else "ranks"
    columns = [what, "loss", "gradient norm", "weights", "differs at step"]
    rows = [
        [world.label, *(f"{value:.1e}" for value in (gap.loss, gap.grad_norm, gap.weights)), str(gap.differs_at or "-")]
        for world, gap in gaps.items()
    ]
    print(f"largest relative differences from {first} over {count(args.steps, 'step')}")
    print("\n".join(table(columns, rows)))
    apart = [world for world, gap in gaps.items() if not gap.largest <= tolerance]
    if not apart:
        labels = ", ".join(world.label for world in worlds)
        print(f"the same on {labels}{'' if args.devices else ' ranks'}, to {tolerance:g}", *rounding, sep="\n")
        return 0
    for world in apart:
        differs = "differs" if args.devices else "differ"
        print(f"not the same: {world} {differs} by more than {tolerance:g}")
    print(*rounding, *reasons, sep="\n", end="\n" if rounding or reasons else "")
    return FAILED


def compare(reference: Path, other: Path, tolerance: float) -> Gap:
    """Compare the run in the folder `other` with the one in `reference`.

    Loss and gradient norm are compared at each step, each parameter at the end: the 2-norm of the difference relative to the
    2-norm of the reference.
    """
    lines = [[line for line in RunDir(folder).metrics() if line["kind"] == "train"] for folder in (reference, other)]
    one, two = ({line["step"]: line for line in of} for of in lines)
    differs_at, largest = None, {"loss": 0.0, "grad_norm": 0.0}
    for step in sorted(one | two):
        for key in largest:
            gap = _relative(one.get(step, {}).get(key), two.get(step, {}).get(key))
            largest[key] = max(largest[key], gap)
            if gap > tolerance and differs_at is None:
                differs_at = step
    return Gap(largest["loss"], largest["grad_norm"], _weight_gap(reference, other), differs_at)


def _check(args: argparse.Namespace) -> list[World]:
    problems = []
    ranks = args.ranks or ("1" if args.devices else "1,2")
    parts = ranks.split(",")
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    devices = args.devices.split(",") if args.devices else []
    if args.devices and (len(numbers) != 1 or len(parts) != 1 or numbers[0] < 1):
        problems.append(f"--ranks {ranks!r} must be a single number from 1, because --devices are compared")
    elif not args.devices and (len(numbers) < len(parts) or len(set(numbers)) < 2 or min(numbers) < 1):
        problems.append(f"--ranks {ranks!r} must be two or more different numbers from 1, such as 1,2,4")
    if args.devices and (len(devices) != len(set(devices)) or set(devices) != set(get_args(Device))):
        problems.append(f"--devices {args.devices!r} must be {' and '.join(get_args(Device))}, such as cpu,cuda")
    if args.steps < 1:
        problems.append(f"--steps {args.steps} must be at least 1")
    if args.tolerance is not None and not args.tolerance > 0:
        problems.append(f"--tolerance {args.tolerance:g} must be above 0")
    if launch_env.is_launched():
        problems.append("same starts ranks itself: leave out torchrun, accelerate launch, mpirun and srun")
    if problems:
        raise InputError.from_problems("nothing was started", problems)
    if devices:
        return [World(numbers[0], device) for device in devices]
    return [World(number) for number in dict.fromkeys(numbers)]


def _overrides(recipe: Recipe, steps: int) -> list[str]:
    """Return overrides for short runs that can be compared: `auto`, which each run would measure again, is fixed."""
    choices = {"precision": "fp32", "memory_format": "contiguous"}
    return [
        *(f"train.{key}={value}" for key, value in choices.items() if getattr(recipe.train, key) == "auto"),
        f"eval.every={steps} steps", f"checkpoint.every={steps} steps", f"train.duration={steps} steps",
        "train.world_size=null", "train.max_wall_s=null", "log.every=1 steps", "log.grad_norm=true",
        "log.wandb=disabled",
    ]  # fmt: skip


def _train(recipe: str, overrides: list[str], world: World, place: Path) -> Path:
    """Train in a world and return the run's folder."""
    folder, log = place / world.label, place / f"{world.label}.log"
    command = [sys.executable, str(TRAIN_SCRIPT), recipe, *overrides, f"run.dir={folder}"]
    if world.device:
        command.append(f"train.device={world.device}")
    print(f"training on {world} ...", flush=True)
    with log.open("wb") as file:
        code = subprocess.run([*command, "--nproc", str(world.ranks)], stdout=file, stderr=file).returncode
    if code:
        complaint = last_complaint(log) or f"exit code {code}"
        kind = InputError if code == BAD_INPUT else TrainingFailed
        raise kind(f"on {world}: {complaint.partition(': ')[2] or complaint}")
    return folder


def _relative(one: float | None, other: float | None) -> float:
    """Return the difference relative to the first; infinite if one of the two is missing."""
    if one == other:
        return 0.0
    return abs(other - one) / abs(one) if one and other is not None else float("inf")


def _weight_gap(reference: Path, other: Path) -> float:
    from safetensors.torch import load_file

    one, two = (load_file(RunDir(folder).weights_path) for folder in (reference, other))
    parameters = {name: value.double() for name, value in one.items() if value.is_floating_point()}
    gaps = [
        (two[name].double() - value).norm().item() / (value.norm().item() or 1.0) for name, value in parameters.items()
    ]
    return max(gaps, default=0.0)


def _rounding(folder: Path) -> list[str]:
    """Say what a run's precision does to a split batch, in a line; none for fp32, where only the order of sums differs."""
    precision = RunDir(folder).config.recipe.train.precision
    if precision not in _GRADIENT_GAPS:
        return []
    return [
        f"{precision} rounds the weight gradients of each rank's part of a batch: they are {_GRADIENT_GAPS[precision]} apart "
        f"at the first step, where outputs are equal, and further apart later; train.precision=fp32 is a sharper test"
    ]


def _reasons(folder: Path, by_device: bool) -> list[str]:
    """Explain which parts of a run's recipe depend on the number of ranks, or on the device, by design."""
    from safetensors import safe_open

    run = RunDir(folder)
    recipe = run.config.recipe
    with safe_open(run.weights_path, framework="pt") as weights:
        names = list(weights.keys())
        has_convolutions = any(len(weights.get_slice(name).get_shape()) == 4 for name in names)
    has_batch_norm = any(name.endswith("running_mean") for name in names)
    reasons = []
    if by_device and has_convolutions and recipe.train.precision == "fp32":
        reasons.append(
            "convolutions in fp32 on a GPU round their inputs to TF32 (11 bits): with NVIDIA_TF32_OVERRIDE=0 in the "
            "environment they do not"
        )
    elif has_batch_norm and not by_device and not recipe.model.get("sync_batch_norm"):
        reasons.append(
            "batch norm normalises over each rank's samples, fewer on more ranks: with model.sync_batch_norm=true it "
            "normalises over the global batch, and runs agree to about 1e-3"
        )
    elif has_batch_norm and not by_device and recipe.train.precision == "fp32":
        reasons.append("batch norm over all ranks sums its statistics in another order: try --tolerance 1e-3")
    dropped = [key for key, value in recipe.model.items() if key.endswith("dropout") and value]
    if dropped:
        zero = " ".join(f"model.{key}=0" for key in dropped)
        reasons.append(
            f"each {'device' if by_device else 'rank'} draws a different dropout mask: turn it off with {zero}"
        )
    return reasons


if __name__ == "__main__":
    run_script(main)
