"""Benchmark of a recipe with several seeds, timed like a speed record: accuracy and time, with their spread.

The time covers data-dependent initialisation, training, and the evaluation with its views. It excludes the start, the upload
of the data, compilation and warm-up (a few steps before the first run), and writing to disk. With --script, a standalone
script of speedrun94's method takes turns with the recipe on the same data: 8 epochs in batches of 2000 images, whatever the
recipe does; with the recipe's batch size and steps if there are fewer images than that.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardstep.launch.benchmarks.bench_tables import Table, standard_error

if TYPE_CHECKING:
    from shardstep.configs.schema import Recipe

_RECIPE = "speedrun94"
_SCRIPT_BATCH_SIZE, _SCRIPT_EPOCHS = 2000, 8
_NEVER = ("log.every=1000000 epochs", "eval.every=1000000 epochs", "checkpoint.every=1000000 epochs")


@dataclass(frozen=True)
class Timed:
    """One run: its test accuracy (0 to 1), its steps, and the seconds of its parts."""

    accuracy: float
    steps: int
    initialize_s: float
    train_s: float
    evaluate_s: float

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return self.initialize_s + self.train_s + self.evaluate_s


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("recipe", nargs="?", default=_RECIPE, help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    turns = "take turns with a standalone script of speedrun94's method, on the same data"
    parser.add_argument("--script", action="store_true", help=turns)


def measure(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Train with the seeds 0, 1, ..., and return tables of accuracy and time.

    Raises:
        InputError: the recipe is refused, has no accuracy, or uses data that the script cannot read.
    """
    from shardstep.configs.errors import InputError
    from shardstep.configs.load import is_override
    from shardstep.trainer.data import make_missing_data
    from shardstep.trainer.run_dir import RunDir

    if is_override(args.recipe):
        args.overrides.insert(0, args.recipe)
        args.recipe = _RECIPE
    warm_up = _load(args, 0, folder / "warm-up", "train.duration=3 steps")
    make_missing_data(warm_up.data)
    samples = _script_samples(warm_up) if args.script else 0
    if _train(warm_up) is None:
        raise InputError(f"recipe {args.recipe} reconstructs images, so it has no accuracy to report")
    train = RunDir(folder / "warm-up").config.recipe.train  # with `auto` resolved, once for all runs
    fixed = [f"train.{key}={getattr(train, key)}" for key in ("device", "precision", "memory_format", "convolutions")]
    chosen = f"{train.device}, {train.precision}, {train.memory_format}, {train.convolutions} convolutions"
    notes = [f"{args.recipe}: {chosen}"]
    runs: dict[str, list[Timed]] = {name: [] for name in (args.recipe, *(["a script"] if args.script else []))}
    with ExitStack() as stack:
        for seed in range(args.repeats):
            recipe = _load(args, seed, folder / f"seed{seed}", *fixed)
            timed = _train(recipe)
            shutil.rmtree(recipe.run.dir)  # including its checkpoint
            assert timed is not None  # the warm-up had an accuracy
            runs[args.recipe].append(timed)
            _print_run(args.recipe, seed, timed)
            if not args.script:
                continue
            if not runs["a script"]:
                batch_size, steps = script_plan(samples, recipe.train.global_batch_size, run_steps=timed.steps)
                run_script = stack.enter_context(_script(recipe, batch_size, steps))
            runs["a script"].append(run_script(seed))
            _print_run("a script", seed, runs["a script"][-1])
    if args.script:
        notes += [f"a script: the method of speedrun94, {steps} steps of {batch_size} images, {train.device}"]
    return _tables(" ".join([args.recipe, *args.overrides]), runs, notes)


def _print_run(name: str, seed: int, timed: Timed) -> None:
    """Print a line as soon as a run is over, because all of them can take hours."""
    print(f"{name}, seed {seed}: {100 * timed.accuracy:.2f} %, {timed.seconds:.1f} s", file=sys.stderr, flush=True)


def script_plan(samples: int, batch_size: int | str, run_steps: int) -> tuple[int, int]:
    """Return batch size and steps of the script: the speed record's, or the run's if there are too few images."""
    if samples < _SCRIPT_BATCH_SIZE:
        return samples if batch_size == "full" else min(samples, int(batch_size)), run_steps
    return _SCRIPT_BATCH_SIZE, _SCRIPT_EPOCHS * (samples // _SCRIPT_BATCH_SIZE)


def _tables(title: str, runs: dict[str, list[Timed]], run_notes: list[str]) -> list[Table]:
    accuracies = {name: [100 * run.accuracy for run in of] for name, of in runs.items()}
    parts = {
        "initialisation, training and evaluation": "seconds", "initialisation": "initialize_s", "training": "train_s",
        "evaluation, with all views": "evaluate_s",
    }  # fmt: skip
    seconds = {
        f"{name}: {part}": [getattr(run, key) for run in of] for name, of in runs.items() for part, key in parts.items()
    }
    reference = list(runs)[-1]
    notes = [f"{name}: {_spread(values)}" for name, values in accuracies.items()]
    return [
        Table(f"{title}: test accuracy", "%", accuracies, reference, [*notes, *run_notes]),
        Table(f"{title}: time", "s", seconds, f"{reference}: initialisation, training and evaluation", run_notes),
    ]


def _load(args: argparse.Namespace, seed: int, folder: Path, *overrides: str) -> "Recipe":
    from shardstep.configs.load import load_recipe
    from shardstep.trainer.data import check_given_folders
    from shardstep.trainer.validate_recipe import validate_recipe

    fixed = [f"run.dir={folder}", "run.resume=never", f"run.seed={seed}", *overrides]
    loaded = load_recipe(args.recipe, [*_NEVER, *args.overrides, *fixed])
    recipe = validate_recipe(loaded)
    check_given_folders(loaded)
    return recipe


def _train(recipe: "Recipe") -> Timed | None:
    from shardstep.trainer import loop, setup
    from shardstep.trainer.checkpoints.lock import release
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.monitoring.display import Display

    run = setup.build(start_world(recipe.train), recipe, Display(enabled=False))
    outcome = loop.train(run)
    run.watchdog.stop()
    run.saver.wait(lambda: None)
    run.metrics.close()
    release(run.dir.path)
    evaluation = outcome.evaluation
    if evaluation is None or evaluation.accuracy is None:
        return None
    wall_s, evaluate_s = float(run.metrics.last_evaluation["wall_s"]), run.state.evaluation_s
    return Timed(evaluation.accuracy, run.state.progress.step, run.initialized_s, wall_s - evaluate_s, evaluate_s)


def _script_samples(recipe: "Recipe") -> int:
    """Return the number of training images, and check that the script can read them, and all that the recipe reads."""
    from shardstep.configs.errors import InputError
    from shardstep.configs.held_out import NO_TEST_SET
    from shardstep.configs.text import listed
    from shardstep.datasets.manifest import open_shards

    data = recipe.data
    others = {"data.mix": data.mix, "data.validation": data.validation, "data.fold": data.fold}
    given = [key for key, value in (others | {f"data.test={NO_TEST_SET}": data.test == NO_TEST_SET}).items() if value]
    if given:
        raise InputError(f"--script trains on data.train and is evaluated on data.test: leave out {listed(given)}")
    manifest = open_shards(data.train).manifest
    is_like_cifar10 = manifest.image_shape == [3, 32, 32] and len(manifest.classes) == 10
    if not is_like_cifar10 or manifest.has_several_labels or data.resize not in (None, 32):
        wanted = "32x32 colour images of 10 classes, one for each, as in CIFAR-10"
        raise InputError(f"--script is for {wanted}; {data.train} has others")
    return manifest.samples


@contextmanager
def _script(recipe: "Recipe", batch_size: int, steps: int) -> Iterator[Callable[[int], Timed]]:
    """Start the script, which loads and compiles once; yield the function that makes it train with a seed."""
    arguments = [recipe.data.train, recipe.data.test, batch_size, steps, recipe.train.device]
    command = [sys.executable, "-m", "shardstep.launch.benchmarks.record_script", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        seeds, results = process.stdin, process.stdout
        assert seeds is not None
        assert results is not None

        def train(seed: int) -> Timed:
            print(seed, file=seeds, flush=True)
            line = results.readline()
            if not line:
                raise subprocess.CalledProcessError(process.wait(), command)
            return Timed(**json.loads(line))

        try:
            yield train
        except BaseException:
            process.kill()
            raise


def _spread(accuracies: list[float]) -> str:
    mean, error = statistics.mean(accuracies), standard_error(accuracies)
    if error is None:
        return f"mean {mean:.2f} %, one run"
    return f"mean {mean:.2f} %, standard error {error:.2f} %, {len(accuracies)} runs"
