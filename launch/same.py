"""Show that a recipe trains the same on any number of ranks: same losses, gradients and weights, step by step.

    shardstep same RECIPE [section.key=value ...] --ranks 1,2,4 [--steps 25] [--tolerance 1e-5]

Exit code 0 if no difference is above the tolerance, 1 if one is.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import Recipe
from shardstep.configs.text import table
from shardstep.launch.cli import BAD_INPUT, FAILED, leave
from shardstep.launch.cli import run as run_command
from shardstep.launch.comparison.results import last_complaint, read_lines
from shardstep.launch.ranks import TRAIN_SCRIPT
from shardstep.trainer.distributed import launch_env


@dataclass(frozen=True)
class Gap:
    """How far two runs are apart: largest relative differences, and the first step beyond the tolerance, if any."""

    loss: float
    grad_norm: float
    weights: float
    parts_at: int | None

    @property
    def largest(self) -> float:
        """Of the three."""
        return max(self.loss, self.grad_norm, self.weights)


def main(arguments: list[str]) -> int:
    """Train on each number of ranks and compare; returns the exit code."""
    args = _parser().parse_intermixed_args(arguments)
    worlds = _check(args)
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.problems:
        raise InputError.from_problems(f"recipe {recipe.source}", recipe.problems)
    overrides = [*args.overrides, *_overrides(recipe.recipe, args.steps)]
    with tempfile.TemporaryDirectory(prefix="shardstep-same-") as place:
        folders = {ranks: _train(args.recipe, overrides, ranks, Path(place)) for ranks in worlds}
        first, *others = worlds
        gaps = {ranks: compare(folders[first], folders[ranks], args.tolerance) for ranks in others}
        reasons = _reasons(folders[first])
    columns = ["ranks", "loss", "gradient norm", "weights", "parts at step"]
    rows = [
        [str(ranks), *(f"{value:.1e}" for value in (gap.loss, gap.grad_norm, gap.weights)), str(gap.parts_at or "-")]
        for ranks, gap in gaps.items()
    ]
    print(f"largest relative differences from {_ranks(first)} over {args.steps} steps")
    print("\n".join(table(columns, rows)))
    apart = [ranks for ranks, gap in gaps.items() if not gap.largest <= args.tolerance]
    if not apart:
        print(f"the same on {', '.join(map(str, worlds))} ranks, to {args.tolerance:g}")
        return 0
    for text in [f"not the same: {_ranks(ranks)} differ by more than {args.tolerance:g}" for ranks in apart] + reasons:
        print(text)
    return FAILED


def compare(reference: Path, other: Path, tolerance: float) -> Gap:
    """How far the run in `other` is from the one in `reference`, by their folders.

    Loss and gradient norm are compared at each step, each parameter's tensor at the end: the 2-norm of the difference over
    that of the reference's.
    """
    one, two = _train_lines(reference), _train_lines(other)
    parts_at, largest = None, {"loss": 0.0, "grad_norm": 0.0}
    for step in sorted(one | two):
        for key in largest:
            gap = _relative(one.get(step, {}).get(key), two.get(step, {}).get(key))
            largest[key] = max(largest[key], gap)
            if gap > tolerance and parts_at is None:
                parts_at = step
    return Gap(largest["loss"], largest["grad_norm"], _weight_gap(reference, other), parts_at)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardstep same", description="Show that a recipe trains the same on any number of ranks."
    )
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="such as model.dropout=0")
    add(
        "--ranks", default="1,2", metavar="N,N,...", help="the first is compared with all others (default: %(default)s)"
    )
    add("--steps", type=int, default=25, help="to train (default: %(default)s)")
    add("--tolerance", type=float, default=1e-5, help="largest relative difference (default: %(default)s)")
    return parser


def _check(args: argparse.Namespace) -> list[int]:
    problems = []
    parts = args.ranks.split(",")
    worlds = [int(part) for part in parts if part.strip().isdecimal()]
    if len(worlds) < len(parts) or len(set(worlds)) < 2 or min(worlds) < 1:
        problems.append(f"--ranks {args.ranks!r} must be two or more different numbers from 1, such as 1,2,4")
    if args.steps < 1:
        problems.append(f"--steps {args.steps} must be at least 1")
    if not args.tolerance > 0:
        problems.append(f"--tolerance {args.tolerance:g} must be above 0")
    if launch_env.is_launched():
        problems.append("same starts ranks itself: leave out torchrun, accelerate launch and srun")
    if problems:
        raise InputError.from_problems("nothing was begun", problems)
    return list(dict.fromkeys(worlds))


def _overrides(recipe: Recipe, steps: int) -> list[str]:
    """Make runs of some steps that can be compared: in one format, which a measurement must not choose anew each time."""
    settled = [
        f"train.{key}={value}"
        for key, value in (("precision", "fp32"), ("memory_format", "contiguous"))
        if getattr(recipe.train, key) == "auto"
    ]
    rare = [f"{key}.every={steps} steps" for key in ("eval", "checkpoint")]
    return [
        *settled, *rare, f"train.duration={steps} steps", "train.world_size=null", "train.max_wall_s=null",
        "log.every=1 steps", "log.grad_norm=true", "log.wandb=disabled",
    ]  # fmt: skip


def _train(recipe: str, overrides: list[str], ranks: int, place: Path) -> Path:
    """Train on a number of ranks; returns the run's folder.

    Raises:
        InputError: the recipe cannot be trained so.
        TrainingFailed: it failed.
    """
    folder, log = place / str(ranks), place / f"{ranks}.log"
    command = [sys.executable, str(TRAIN_SCRIPT), recipe, *overrides, f"run.dir={folder}"]
    print(f"training on {_ranks(ranks)} ...", flush=True)
    with log.open("wb") as file:
        code = subprocess.run([*command, "--nproc", str(ranks)], stdout=file, stderr=file).returncode
    if code:
        complaint = last_complaint(log) or f"exit code {code}"
        kind = InputError if code == BAD_INPUT else TrainingFailed
        raise kind(f"on {_ranks(ranks)}: {complaint.partition(': ')[2] or complaint}")
    return folder


def _train_lines(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"}


def _relative(one: float | None, other: float | None) -> float:
    """The difference as a share of the first; infinite where one of the two is missing."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    if one == other:
        return 0.0
    return abs(other - one) / abs(one) if one else float("inf")


def _weight_gap(reference: Path, other: Path) -> float:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "model.safetensors") for folder in (reference, other))
    gaps = [0.0]
    for name, value in one.items():
        if value.is_floating_point():
            difference = (two[name].double() - value.double()).norm().item()
            gaps.append(difference / (value.double().norm().item() or 1.0))
    return max(gaps)


def _reasons(folder: Path) -> list[str]:
    """What of a run's model depends on the number of ranks by its nature."""
    from safetensors import safe_open

    recipe = load_recipe(str(folder / "config.yaml")).recipe
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        has_batch_norm = any(name.endswith("running_mean") for name in weights.keys())  # noqa: SIM118 - no mapping
    reasons = []
    if has_batch_norm and not recipe.model.get("sync_batch_norm"):
        reasons.append(
            "batch norm normalises over each rank's own samples, of which there are fewer on more ranks: with "
            "model.sync_batch_norm=true it does over the global batch, and runs agree to about 1e-3"
        )
    elif has_batch_norm:
        reasons.append("batch norm over all ranks adds up its statistics in another order: try --tolerance 1e-3")
    dropped = [key for key, value in recipe.model.items() if key.endswith("dropout") and value]
    if dropped:
        zero = " ".join(f"model.{key}=0" for key in dropped)
        reasons.append(f"each rank draws its own dropout: without it, {zero}, nothing random differs between ranks")
    if recipe.train.precision != "fp32":
        reasons.append(f"{recipe.train.precision} rounds coarsely: train.precision=fp32 shows the order of sums alone")
    return reasons


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
