"""Benchmark of checkpoints: steps per second of the article's net, with and without a checkpoint every 50 steps."""

import argparse
import time
from pathlib import Path

from shardstep.launch.benchmarks.bench_step import article_run, probe_choices
from shardstep.launch.benchmarks.bench_tables import Table, in_turn, whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    steps = "steps to time in each repeat (default: %(default)s)"
    parser.add_argument("--steps", type=whole_number, default=200, help=steps)


def measure(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Measure the steps per second of both."""
    precision, method = probe_choices(folder, "auto")
    compute = [f"train.precision={precision}", "train.memory_format=channels_last", f"train.convolutions={method}"]
    works = {
        "no checkpoint": lambda: _steps_per_s(folder, args.steps, "1000 epochs", compute),
        "a checkpoint every 50 steps": lambda: _steps_per_s(folder, args.steps, "50 steps", compute),
    }
    title = f"article_cnn, Adam, {precision}, {method} convolutions, batch 16, {args.steps} steps"
    return [Table(title, "steps/s", in_turn(works, args.repeats), "no checkpoint")]


def _steps_per_s(folder: Path, steps: int, checkpoints: str, compute: list[str]) -> float:
    """Measure without the final checkpoint, which a run waits for."""
    from shardstep.trainer import loop

    run = article_run(
        folder, *compute, f"train.duration={steps + 1} steps", "log.every=1000 steps", f"checkpoint.every={checkpoints}"
    )  # fmt: skip
    marks: list[float] = []
    run.display.advance = lambda step: marks.append(time.perf_counter())  # type: ignore[method-assign]
    loop.train(run)
    run.watchdog.stop()
    run.saver.wait(lambda: None)
    return (len(marks) - 1) / (marks[-1] - marks[0])
