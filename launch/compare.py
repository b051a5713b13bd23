"""Compare variants of a recipe, such as optimizers: equal budgets, several seeds, and tests of which differences are real.

    shardstep compare RECIPE [section.key=value ...] --over optimizer.name=sgd,adam,... --seeds 3 --budget "3 epochs"
    shardstep compare article_cnn --variants optimizers --tune optimizer.lr --trials 3 --budget "60 s" --seeds 3

Each run is an ordinary run folder, DIR/<variant>/<seed>, written by a `shardstep train` process. The same command resumes an
interrupted comparison: it keeps finished runs and resumes the others. DIR then holds table.txt, results.json, report.html and
the plots.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

from shardstep.configs.cores import usable_cores
from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.launch.cli import FAILED, run_script
from shardstep.launch.comparison.planned_runs import Comparison, prepare
from shardstep.launch.comparison.pool import End, Task, run_tasks, visible_gpus
from shardstep.launch.comparison.results import read_result
from shardstep.launch.entry import STOPPED
from shardstep.trainer.checkpoints import lock
from shardstep.trainer.stopping.stop_requests import STOP_FILE


def main(arguments: list[str]) -> int:
    """Compare; return the exit code: 0 even if some variants failed, 85 if interrupted."""
    args = _parser().parse_intermixed_args(arguments)
    comparison = prepare(args, f"shardstep compare {shlex.join(arguments)}")
    if args.dry_run:
        for task in [*comparison.search_tasks(), *comparison.seed_tasks()]:
            print(shlex.join(["shardstep", "train", *task.arguments]))
        return 0
    comparison.save()
    return _submit(comparison, args) if args.slurm is not None else _run(comparison, args)


def _parser() -> argparse.ArgumentParser:
    what = "Compare variants of a recipe."
    parser = argparse.ArgumentParser(prog="shardstep compare", description=what, allow_abbrev=False)
    add = parser.add_argument
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides for all variants")
    add("--over", action="append", default=[], metavar="KEY=A,B,...", help="the variants; several options make a grid")
    add("--variants", metavar="FILE", help="or YAML of them, name: [section.key=value, ...]; `optimizers` is built in")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default: 3)")
    add("--budget", metavar="B", help='of each run: "3 epochs", "500 steps", "120 s" (default: the recipe\'s duration)')
    add("--tune", metavar="KEY", help="first search the best value of this key for each variant, such as optimizer.lr")
    add("--trials", type=int, metavar="K", help="values to try, sqrt(10) apart; up to 3 more at an edge (default: 3)")
    add("--target", type=float, metavar="A", help="accuracy to time runs to (default: nine tenths of the best mean)")
    add("--parallel", type=int, default=1, metavar="P", help="runs at once, on GPUs or CPU cores (default: 1)")
    add("--within", type=float, metavar="MINUTES", help="start no run that would exceed this time")
    add("--slurm", metavar="OPTIONS", help="run as a job array, with options of `shardstep submit`: '--time 60 ...'")
    add("--out", type=Path, metavar="DIR", help="(default: runs/compare-<recipe>)")
    add("--doc", type=Path, metavar="FILE", help="also write the report as Markdown, with its plots beside it")
    add("--dry-run", action="store_true", help="print the commands of the runs, start nothing")
    return parser


def _run(comparison: Comparison, args: argparse.Namespace) -> int:
    """Run what is missing on this machine, then write the report; return the exit code."""
    from shardstep.launch.comparison.comparison_report import write_report

    try:
        lock.hold(comparison.folder, lambda text: print(f"warning: {text}", file=sys.stderr))
    except InputError:
        raise InputError(f"another `shardstep compare` is running in {comparison.folder}: wait until it ends") from None
    if running := comparison.running():
        stop = shlex.quote(str(running[0] / STOP_FILE))
        raise InputError(
            f"an earlier command left {count(len(running), 'run')} running: wait for the end, or stop with `touch {stop}`"
        )
    gpus = [] if comparison.on_cpu else visible_gpus()
    room = len(gpus) or usable_cores().count
    if args.parallel > room:
        kind = "GPU" if gpus else "core"
        text = f"--parallel {args.parallel} on {count(room, kind)}: several runs share a {kind} and take longer"
        print(f"warning: {text}", file=sys.stderr)
    deadline = time.monotonic() + (60 * args.within if args.within else math.inf)
    tried: set[str] = set()  # in this call: a run that could not finish is a row of the table, not retried at once
    end: End = "done"
    progress = _Progress(comparison.folder)
    if probe := comparison.probe_task():
        end = run_tasks([probe], args.parallel, gpus, lambda task, code, seconds: None)
        if end == "done":
            comparison.resolve_auto()
    while end == "done":
        tasks = [task for task in comparison.search_tasks() if task.name not in tried]
        if not tasks:  # runs by seed need their learning rate: the search comes first
            comparison.fix_rates()
            tasks = [task for task in comparison.seed_tasks() if task.name not in tried]
        if not tasks:
            break
        comparison.check_share()
        tried |= {task.name for task in tasks}
        print(f"{count(len(tasks), 'run')} of {comparison.budget.text}, {args.parallel} at once", flush=True)
        progress.begin(len(tasks))
        left_s = deadline - time.monotonic()
        end = run_tasks(tasks, args.parallel, gpus, progress.ended, left_s, progress.longest_s)
    again = f"the same command resumes: {comparison.command}"
    if end == "stopped":
        print(f"stopped: finished and unfinished runs are saved in {comparison.folder}; {again}", file=sys.stderr)
        return STOPPED
    if end == "out of time":
        print(f"--within {args.within:g} minutes are over: the report is of the runs so far; {again}", file=sys.stderr)
    variants = comparison.read_results()
    print(*(f"written: {path}" for path in write_report(comparison, variants, args.doc)), sep="\n")
    return 0 if any(variant.finished for variant in variants) else FAILED


class _Progress:
    """Prints how each run ended."""

    def __init__(self, folder: Path):
        self._folder, self._total, self._done, self.longest_s = folder, 0, 0, 0.0

    def begin(self, total: int) -> None:
        """Start counting a batch of runs."""
        self._total, self._done = total, 0

    def ended(self, task: Task, code: int, seconds: float) -> None:
        """Print a line for a run that has ended."""
        self._done, self.longest_s = self._done + 1, max(self.longest_s, seconds)
        result = read_result(self._folder.joinpath(*task.name.split(" ")), task.log)
        text = result.reason or f"exit code {code}, see {task.log}"
        if result.last and result.last.accuracy is not None:
            loss = "" if result.train_loss is None else f", training loss {result.train_loss:.4f}"
            text = f"{result.measure} {result.last.accuracy:.2%}{loss}"
        print(f"[{self._done}/{self._total}] {task.name}: {text}, {seconds:.0f} s", flush=True)


def _submit(comparison: Comparison, args: argparse.Namespace) -> int:
    """Write the report of the runs so far, and submit the missing ones as a job array; return the exit code."""
    from shardstep.launch.comparison.comparison_report import write_report
    from shardstep.launch.submit import submit_tasks

    running = comparison.running()
    comparison.fix_rates()
    tasks = [*comparison.search_tasks(), *comparison.seed_tasks()]
    variants = comparison.read_results()
    if any(variant.finished for variant in variants) or not tasks:
        print(*(f"written: {path}" for path in write_report(comparison, variants, args.doc)), sep="\n")
    if running:
        print(f"{count(len(running), 'run')} still running: nothing submitted; repeat the command when they have ended")
        return 0
    if not tasks:
        return 0
    comparison.check_share()
    shared = [*comparison.arguments, f"run.name={comparison.folder.name}"]
    added = [task.arguments[len(comparison.arguments) :] for task in tasks]
    code = submit_tasks([*shared, *shlex.split(args.slurm)], added, comparison.command)
    if code == 0 and "--dry-run" not in args.slurm.split():
        print("when its tasks have ended, the same command submits the runs still missing, or writes the report")
    return code


if __name__ == "__main__":
    run_script(main)
