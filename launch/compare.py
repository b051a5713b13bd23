"""Compare variants of a recipe, optimizers above all: equal budgets, several seeds, and what of the outcome is real.

    shardstep compare RECIPE [section.key=value ...] --over optimizer.name=sgd,adam,... --seeds 3 --budget "3 epochs"
    shardstep compare article_cnn --variants optimizers --tune optimizer.lr --trials 3 --budget "60 s" --seeds 3

Each run is an ordinary run folder, DIR/<variant>/<seed>, made by `shardstep train` in a process of its own. The same command
goes on where it was interrupted: finished runs are kept, half runs are resumed. DIR then holds table.txt, results.json,
report.html and the plots.
"""

import argparse
import math
import os
import shlex
import sys
import time
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.launch.cli import FAILED, STOPPED, leave
from shardstep.launch.cli import run as run_command
from shardstep.launch.comparison.planned_runs import Comparison, prepare
from shardstep.launch.comparison.pool import End, Task, run_tasks, visible_gpus
from shardstep.launch.comparison.results import read_result
from shardstep.trainer.checkpoints import lock
from shardstep.trainer.stopping.stop_requests import STOP_FILE


def main(arguments: list[str]) -> int:
    """Compare; returns the exit code: 0 also if variants failed, 85 if it was interrupted."""
    args = _parser().parse_intermixed_args(arguments)
    comparison = prepare(args, f"shardstep compare {shlex.join(arguments)}")
    if args.dry_run:
        for task in [*comparison.search_tasks(), *comparison.seed_tasks()]:
            print(shlex.join(["shardstep", "train", *task.arguments]))
        return 0
    comparison.save()
    return _submit(comparison, args) if args.slurm is not None else _run(comparison, args)


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
    add(
        "--trials", type=int, metavar="K", help="rates to try, sqrt(10) apart, and up to 3 more at an edge (default: 3)"
    )
    add("--target", type=float, metavar="A", help="accuracy to reach (default: nine tenths of the best mean)")
    add("--parallel", type=int, default=1, metavar="P", help="runs at once, over GPUs or CPU cores (default: 1)")
    add("--within", type=float, metavar="MINUTES", help="begin no run that would not end within this time")
    add("--slurm", metavar="OPTIONS", help="run as a job array: options of `shardstep submit`, '--time 60 ...'")
    add("--out", type=Path, metavar="DIR", help="(default: runs/compare-<recipe>)")
    add("--doc", type=Path, metavar="FILE", help="write the answer as Markdown, too, with its plots beside it")
    add("--dry-run", action="store_true", help="print the runs' commands, start nothing")
    return parser


def _run(comparison: Comparison, args: argparse.Namespace) -> int:
    """Run what is missing here, then write the answer. Returns the exit code."""
    from shardstep.launch.comparison.comparison_report import write_report

    try:
        lock.hold(comparison.folder, lambda text: print(f"warning: {text}", file=sys.stderr))
    except InputError:
        raise InputError(f"another `shardstep compare` is at work in {comparison.folder}: wait for its end") from None
    running = comparison.running()
    if running:
        are = (
            "1 run of an earlier command is" if len(running) == 1 else f"{len(running)} runs of an earlier command are"
        )
        stop = shlex.quote(str(running[0] / STOP_FILE))
        raise InputError(f"{are} still at work: wait for the end, or ask for it with `touch {stop}`")
    gpus = [] if comparison.on_cpu else visible_gpus()
    room = len(gpus) or len(os.sched_getaffinity(0))
    if args.parallel > room:
        shared = "a GPU" if gpus else "a core"
        print(
            f"warning: --parallel {args.parallel} on {room}: several runs share {shared}, and take longer",
            file=sys.stderr,
        )
    deadline = time.monotonic() + (60 * args.within if args.within else math.inf)
    tried: set[str] = set()  # in this call: what could not be finished is a row, and is not begun again at once
    end: End = "done"
    progress = _Progress(comparison)
    probe = comparison.probe_task()
    if probe:
        end = run_tasks([probe], args.parallel, gpus, lambda task, code, seconds: None)
        if end == "done":
            comparison.settle()
    while end == "done":
        tasks = [task for task in comparison.search_tasks() if task.name not in tried]
        if not tasks:  # seeds need their rate: all of the search comes first
            comparison.fix_rates()
            tasks = [task for task in comparison.seed_tasks() if task.name not in tried]
        if not tasks:
            break
        comparison.check_share()
        tried |= {task.name for task in tasks}
        runs = f"{len(tasks)} {'run' if len(tasks) == 1 else 'runs'}"
        print(f"{runs} of {comparison.budget.text}, {args.parallel} at once", flush=True)
        progress.begin(len(tasks))
        left_s = deadline - time.monotonic()
        end = run_tasks(tasks, args.parallel, gpus, progress.ended, left_s, progress.longest_s)
    again = f"the same command goes on from there: {comparison.command}"
    if end == "stopped":
        print(f"stopped: finished runs are kept, half runs are saved in {comparison.folder}; {again}", file=sys.stderr)
        return STOPPED
    if end == "out of time":
        print(f"--within {args.within:g} minutes are over: what follows is what there is; {again}", file=sys.stderr)
    variants = comparison.results()
    for path in write_report(comparison, variants, args.doc):
        print(f"written: {path}")
    return 0 if any(variant.finished for variant in variants) else FAILED


class _Progress:
    """Says how each run ended."""

    def __init__(self, comparison: Comparison):
        self._comparison, self._total, self._done = comparison, 0, 0
        self.longest_s = 0.0

    def begin(self, total: int) -> None:
        """So many runs follow."""
        self._total, self._done = total, 0

    def ended(self, task: Task, code: int, seconds: float) -> None:
        """Print a line about a run that has ended."""
        self._done, self.longest_s = self._done + 1, max(self.longest_s, seconds)
        name, run = task.name.split(" ")
        outcome = read_result(self._comparison.folder / name / run, task.log)
        what = outcome.reason or f"exit code {code}, see {task.log}"
        if outcome.last and outcome.last.accuracy is not None:
            loss = "" if outcome.train_loss is None else f", training loss {outcome.train_loss:.4f}"
            what = f"accuracy {outcome.last.accuracy:.2%}{loss}"
        print(f"[{self._done}/{self._total}] {task.name}: {what}, {seconds:.0f} s", flush=True)


def _submit(comparison: Comparison, args: argparse.Namespace) -> int:
    """Write the answer as far as there is one, and submit what is missing as a job array. Returns the exit code."""
    from shardstep.launch.comparison.comparison_report import write_report
    from shardstep.launch.submit import submit_tasks

    running = comparison.running()
    comparison.fix_rates()
    tasks = [*comparison.search_tasks(), *comparison.seed_tasks()]
    variants = comparison.results()
    if any(variant.finished for variant in variants) or not tasks:
        for path in write_report(comparison, variants, args.doc):
            print(f"written: {path}")
    if running:
        print(
            f"runs still at work: {len(running)}. Nothing is submitted now; the same command goes on when they have ended"
        )
        return 0
    if not tasks:
        return 0
    comparison.check_share()
    shared = [*comparison.arguments, f"run.name={comparison.folder.name}"]
    added = [task.arguments[len(comparison.arguments) :] for task in tasks]
    code = submit_tasks([*shared, *shlex.split(args.slurm)], added, comparison.command)
    if code == 0 and "--dry-run" not in args.slurm.split():
        print("when its tasks have ended, the same command submits what is still missing, or writes the answer")
    return code


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
