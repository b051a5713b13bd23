"""Train a recipe with one seed after another, timed as speed records are: accuracy and time, with their spread.

Timed are data-dependent initialisation, training, and the evaluation with its views. Not timed are the start, the upload of
the data, compilation and warm-up, for which a few steps are taken before the first run, and what is written to disk.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from shardstep.launch.bench_tables import Table

_NEVER = ("log.every=1000000 epochs", "eval.every=1000000 epochs", "checkpoint.every=1000000 epochs")


@dataclass(frozen=True)
class Timed:
    """One run: its test accuracy (0 to 1), and the seconds of its parts."""

    accuracy: float
    initialize_s: float
    train_s: float
    evaluate_s: float

    @property
    def seconds(self) -> float:
        return self.initialize_s + self.train_s + self.evaluate_s


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `shardstep bench record`."""
    parser.add_argument("recipe", nargs="?", default="speedrun94", help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def measure(given: argparse.Namespace, folder: Path) -> list[Table]:
    """Train with the seeds 0, 1, ..., and make tables of it."""
    from shardstep.configs.errors import InputError

    _train(given.recipe, [*given.overrides, "run.seed=0", "train.duration=3 steps"], folder / "warm-up")
    runs = []
    for seed in range(given.repeats):
        timed = _train(given.recipe, [*given.overrides, f"run.seed={seed}"], folder / f"seed{seed}")
        if timed is None:
            raise InputError(f"recipe {given.recipe} reconstructs images: it has no accuracy to keep a record of")
        runs.append(timed)
    accuracies, seconds = [100 * run.accuracy for run in runs], [run.seconds for run in runs]
    title = f"{given.recipe} {' '.join(given.overrides)}".strip()
    parts = {
        "initialisation, training and evaluation": seconds,
        "initialisation": [run.initialize_s for run in runs],
        "training": [run.train_s for run in runs],
        "evaluation, with all views": [run.evaluate_s for run in runs],
    }
    return [
        Table(f"{title}: test accuracy", "%", {"accuracy": accuracies}, "accuracy", [_spread(accuracies)]),
        Table(f"{title}: time", "s", parts, "initialisation, training and evaluation", []),
    ]


def _train(name: str, overrides: list[str], folder: Path) -> Timed | None:
    from shardstep.configs.load import load_recipe
    from shardstep.trainer import loop, runtime, setup
    from shardstep.trainer.check import check_recipe
    from shardstep.trainer.data import make_missing_data
    from shardstep.trainer.display import Display

    recipe = check_recipe(load_recipe(name, [*_NEVER, *overrides, f"run.dir={folder}", "run.resume=never"]))
    make_missing_data(recipe.data)
    run = setup.build(runtime.start(recipe.train), recipe, Display(enabled=False))
    outcome = loop.train(run)
    run.watchdog.stop()
    run.saver.wait(lambda: None)
    evaluation = outcome.evaluation
    if evaluation is None or evaluation.accuracy is None:
        return None
    wall_s, evaluate_s = float(run.metrics.last_evaluation["wall_s"]), run.state.evaluation_s
    return Timed(evaluation.accuracy, run.initialized_s, wall_s - evaluate_s, evaluate_s)


def _spread(accuracies: list[float]) -> str:
    mean, count = statistics.mean(accuracies), len(accuracies)
    if count == 1:
        return f"mean {mean:.2f} %, one run"
    return f"mean {mean:.2f} %, standard error {statistics.stdev(accuracies) / count**0.5:.2f} %, {count} runs"
