"""Compare variants of a recipe, optimizers above all: equal budgets, several seeds, and what of the outcome is real.

    shardstep compare RECIPE [section.key=value ...] --over optimizer.name=sgd,adam,... --seeds 3 --budget "3 epochs"
    shardstep compare article_cnn --variants optimizers --tune optimizer.lr --trials 3 --budget "60 s" --seeds 3

Each run is an ordinary run folder, DIR/<variant>/<seed>, made by `shardstep train` in a process of its own. The same command
goes on where it was interrupted: finished runs are kept, half runs are resumed. DIR then holds table.txt, results.json,
report.html and the plots.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

from shardstep.launch.cli import FAILED, STOPPED, leave
from shardstep.launch.cli import run as run_command
from shardstep.launch.comparison import Comparison, prepare
from shardstep.launch.outcomes import read_outcome
from shardstep.launch.pool import End, Task, run_tasks, visible_gpus


def main(arguments: list[str]) -> int:
    """Compare; returns the exit code: 0 also if variants failed, 85 if it was interrupted."""
    given = _parser().parse_intermixed_args(arguments)
    comparison = prepare(given, f"shardstep compare {shlex.join(arguments)}")
    if given.dry_run:
        for task in [*comparison.search_tasks(), *comparison.seed_tasks()]:
            print(shlex.join(["shardstep", "train", *task.arguments]))
        return 0
    comparison.save()
    return _submit(comparison, given) if given.slurm is not None else _run(comparison, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardstep compare", description="Compare variants of a recipe.", allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="for all variants")
    add("--over", action="append", default=[], metavar="KEY=A,B,...", help="the variants; several make a grid")
    add("--variants", metavar="FILE", help="or YAML of them, name: [section.key=value, ...]; or optimizers, ours")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default: 3)")
    add("--budget", metavar="B", help='of each run: "3 epochs", "500 steps", "120 s" (default: the recipe\'s duration)')
    add("--tune", metavar="KEY", help="first search this rate for each variant, such as optimizer.lr")
    add("--trials", type=int, metavar="K", help="rates to try, a factor of sqrt(10) apart (default: 3)")
    add("--target", type=float, metavar="A", help="accuracy to reach (default: nine tenths of the best mean)")
    add("--parallel", type=int, default=1, metavar="P", help="runs at once, over GPUs or CPU cores (default: 1)")
    add("--within", type=float, metavar="MINUTES", help="begin no run that would not end within this time")
    add("--slurm", metavar="OPTIONS", help="run as a job array: options of `shardstep submit`, '--time 60 ...'")
    add("--out", type=Path, metavar="DIR", help="(default: runs/compare-<recipe>)")
    add("--doc", type=Path, metavar="FILE", help="write the answer as Markdown, too, with its plots beside it")
    add("--dry-run", action="store_true", help="print the runs' commands, start nothing")
    return parser


def _run(comparison: Comparison, given: argparse.Namespace) -> int:
    """Run what is missing here, then write the answer. Returns the exit code."""
    from shardstep.launch.answer import write_answer

    deadline = time.monotonic() + (60 * given.within if given.within else math.inf)
    gpus = visible_gpus() if "train.device=cpu" not in given.overrides else []
    tried: set[str] = set()  # in this call: what could not be finished is a row, and is not begun again at once
    end: End = "done"
    while end == "done":
        tasks = [task for task in comparison.search_tasks() if task.name not in tried]
        if not tasks:  # seeds need their rate: all of the search comes first
            comparison.fix_rates()
            tasks = [task for task in comparison.seed_tasks() if task.name not in tried]
        if not tasks:
            break
        if not comparison.settled:  # the first run measures what is left to `auto`, for all
            tasks = tasks[:1]
        tried |= {task.name for task in tasks}
        runs = f"{len(tasks)} {'run' if len(tasks) == 1 else 'runs'}"
        print(f"{runs} of {comparison.budget.text}, {given.parallel} at once", flush=True)
        progress = _Progress(comparison, len(tasks))
        end = run_tasks(tasks, given.parallel, gpus, progress.ended, deadline - time.monotonic())
        if not comparison.settled:
            comparison.settle()
    again = f"the same command goes on from there: {comparison.command}"
    if end == "stopped":
        print(f"stopped: finished runs are kept, half runs are saved in {comparison.folder}; {again}", file=sys.stderr)
        return STOPPED
    if end == "out of time":
        print(f"--within {given.within:g} minutes are over: what follows is what there is; {again}", file=sys.stderr)
    variants = comparison.results()
    for path in write_answer(comparison, variants, given.doc):
        print(f"written: {path}")
    return 0 if any(variant.finished for variant in variants) else FAILED


class _Progress:
    """Says how each run ended."""

    def __init__(self, comparison: Comparison, total: int):
        self._comparison, self._total, self._done = comparison, total, 0

    def ended(self, task: Task, code: int, seconds: float) -> None:
        """Print a line about a run that has ended."""
        self._done += 1
        name, run = task.name.split(" ")
        outcome = read_outcome(self._comparison.folder / name / run, task.log)
        what = outcome.reason or f"exit code {code}, see {task.log}"
        if outcome.last and outcome.last.accuracy is not None:
            what = f"accuracy {outcome.last.accuracy:.2%}, training loss {outcome.train_loss or math.nan:.4f}"
        print(f"[{self._done}/{self._total}] {task.name}: {what}, {seconds:.0f} s", flush=True)


def _submit(comparison: Comparison, given: argparse.Namespace) -> int:
    """Submit what is missing as a job array; when nothing is, write the answer. Returns the exit code."""
    from shardstep.launch.answer import write_answer
    from shardstep.launch.submit import submit_tasks

    tasks = comparison.search_tasks()
    if not tasks:
        comparison.fix_rates()
        tasks = comparison.seed_tasks()
    if tasks:
        shared = [*comparison.arguments, f"run.name={comparison.folder.name}"]
        added = [task.arguments[len(comparison.arguments) :] for task in tasks]
        code = submit_tasks([*shared, *shlex.split(given.slurm)], added, comparison.command)
        if code == 0 and "--dry-run" not in given.slurm.split():
            print("when its tasks have ended, the same command submits what is still missing, or writes the answer")
        return code
    for path in write_answer(comparison, comparison.results(), given.doc):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
