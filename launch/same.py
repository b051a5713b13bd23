"""Check that a recipe trains the same on any number of ranks: same losses, gradients and weights, step by step.

    shardstep same RECIPE [section.key=value ...] --ranks 1,2,4 [--steps 25] [--tolerance T]

Exit code 0 if no difference exceeds the tolerance, 1 otherwise.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import Recipe
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
    """Train on each number of ranks and compare; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep same", description="Check that a recipe trains the same on any number of ranks."
    )
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="such as model.dropout=0")
    add("--ranks", default="1,2", metavar="N,N,...", help="compare the first with all others (default: %(default)s)")
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
        folders = {ranks: _train(args.recipe, overrides, ranks, Path(place)) for ranks in worlds}
        first, *others = worlds
        tolerance = args.tolerance or _TOLERANCES[RunDir(folders[first]).config.recipe.train.precision]
        gaps = {ranks: compare(folders[first], folders[ranks], tolerance) for ranks in others}
        rounding, reasons = _rounding(folders[first]), _reasons(folders[first])
    columns = ["ranks", "loss", "gradient norm", "weights", "differs at step"]
    rows = [
        [str(ranks), *(f"{value:.1e}" for value in (gap.loss, gap.grad_norm, gap.weights)), str(gap.differs_at or "-")]
        for ranks, gap in gaps.items()
    ]
    print(f"largest relative differences from {count(first, 'rank')} over {count(args.steps, 'step')}")
    print("\n".join(table(columns, rows)))
    apart = [ranks for ranks, gap in gaps.items() if not gap.largest <= tolerance]
    if not apart:
        print(*[f"the same on {', '.join(map(str, worlds))} ranks, to {tolerance:g}", *rounding], sep="\n")
        return 0
    for ranks in apart:
        print(f"not the same: {count(ranks, 'rank')} differ by more than {tolerance:g}")
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


def _check(args: argparse.Namespace) -> list[int]:
    problems = []
    parts = args.ranks.split(",")
    worlds = [int(part) for part in parts if part.strip().isdecimal()]
    if len(worlds) < len(parts) or len(set(worlds)) < 2 or min(worlds) < 1:
        problems.append(f"--ranks {args.ranks!r} must be two or more different numbers from 1, such as 1,2,4")
    if args.steps < 1:
        problems.append(f"--steps {args.steps} must be at least 1")
    if args.tolerance is not None and not args.tolerance > 0:
        problems.append(f"--tolerance {args.tolerance:g} must be above 0")
    if launch_env.is_launched():
        problems.append("same starts ranks itself: leave out torchrun, accelerate launch and srun")
    if problems:
        raise InputError.from_problems("nothing was started", problems)
    return list(dict.fromkeys(worlds))


def _overrides(recipe: Recipe, steps: int) -> list[str]:
    """Return overrides for short runs that can be compared: `auto`, which each run would measure again, is fixed."""
    choices = {"precision": "fp32", "memory_format": "contiguous"}
    return [
        *(f"train.{key}={value}" for key, value in choices.items() if getattr(recipe.train, key) == "auto"),
        f"eval.every={steps} steps", f"checkpoint.every={steps} steps", f"train.duration={steps} steps",
        "train.world_size=null", "train.max_wall_s=null", "log.every=1 steps", "log.grad_norm=true",
        "log.wandb=disabled",
    ]  # fmt: skip


def _train(recipe: str, overrides: list[str], ranks: int, place: Path) -> Path:
    """Train on a number of ranks and return the run's folder."""
    folder, log = place / str(ranks), place / f"{ranks}.log"
    command = [sys.executable, str(TRAIN_SCRIPT), recipe, *overrides, f"run.dir={folder}"]
    print(f"training on {count(ranks, 'rank')} ...", flush=True)
    with log.open("wb") as file:
        code = subprocess.run([*command, "--nproc", str(ranks)], stdout=file, stderr=file).returncode
    if code:
        complaint = last_complaint(log) or f"exit code {code}"
        kind = InputError if code == BAD_INPUT else TrainingFailed
        raise kind(f"on {count(ranks, 'rank')}: {complaint.partition(': ')[2] or complaint}")
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


def _reasons(folder: Path) -> list[str]:
    """Explain which parts of a run's recipe depend on the number of ranks by design."""
    from safetensors import safe_open

    run = RunDir(folder)
    recipe = run.config.recipe
    with safe_open(run.weights_path, framework="pt") as weights:
        has_batch_norm = any(name.endswith("running_mean") for name in weights.keys())  # noqa: SIM118 - not a mapping
    reasons = []
    if has_batch_norm and not recipe.model.get("sync_batch_norm"):
        reasons.append(
            "batch norm normalises over each rank's samples, fewer on more ranks: with model.sync_batch_norm=true it "
            "normalises over the global batch, and runs agree to about 1e-3"
        )
    elif has_batch_norm and recipe.train.precision == "fp32":
        reasons.append("batch norm over all ranks sums its statistics in another order: try --tolerance 1e-3")
    dropped = [key for key, value in recipe.model.items() if key.endswith("dropout") and value]
    if dropped:
        zero = " ".join(f"model.{key}=0" for key in dropped)
        reasons.append(f"each rank draws a different dropout mask: turn it off with {zero}")
    return reasons


if __name__ == "__main__":
    run_script(main)
