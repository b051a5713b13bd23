"""Benchmark of the step: the trainer's loop, a hand-written one, and Lightning's if installed, on the article's net."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shardstep.launch.benchmarks.bench_tables import Table, importable, in_turn, whole_number

if TYPE_CHECKING:
    from shardstep.trainer.run import Run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add, sizes = parser.add_argument, "global batch sizes (default: 16 256)"
    add("--batches", type=whole_number, nargs="+", default=[16, 256], metavar="SIZE", help=sizes)
    add("--images", type=whole_number, default=3000, help="images to time in each repeat (default: %(default)s)")
    add("--precision", choices=["bf16", "fp32"], help="of all loops (default: the faster one for the trainer here)")


def measure(args: argparse.Namespace, folder: Path) -> Iterator[Table]:
    """Measure the images per second of each loop, in a table per batch size."""
    precision, method = probe_choices(folder, args.precision or "auto")
    with_lightning = importable("lightning")
    notes = [] if with_lightning else ["Lightning is not installed"]
    for batch_size in args.batches:
        steps = max(2, args.images // batch_size)
        ours = partial(_trainer, folder, batch_size, steps, precision)
        works = {
            "bare loop": partial(_in_own_process, "bare_loop", batch_size, steps, precision),
            "shardstep": partial(ours, "direct"),
        }
        if method != "direct":
            works[f"shardstep, {method} convolutions"] = partial(ours, method)
        if with_lightning:
            works["Lightning"] = partial(_in_own_process, "lightning_loop", batch_size, steps, precision)
        values = in_turn(works, args.repeats)
        title = f"article_cnn, Adam, {precision}, batch {batch_size}, {steps} steps after as many to warm up"
        yield Table(title, "images/s", values, "bare loop", notes)


def article_run(folder: Path, *overrides: str) -> "Run":
    """Build a new run of the article's net on synthetic images, which are written to `folder` if missing."""
    from shardstep.configs.load import load_recipe
    from shardstep.datasets.write import write_shards
    from shardstep.launch.benchmarks.bare_loop import NUM_IMAGES
    from shardstep.trainer import setup
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.monitoring.display import Display
    from shardstep.trainer.validate_recipe import validate_recipe

    for split, count in (("train", NUM_IMAGES), ("test", 16)):
        if not (folder / split).exists():
            write_shards(f"synthetic:{count}", split, folder / split)
    number = len(list(folder.glob("run*")))
    recipe = validate_recipe(load_recipe("article_cnn", [
        f"run.dir={folder / f'run{number}'}", f"data.train={folder / 'train'}", f"data.test={folder / 'test'}",
        "eval.every=1000 epochs", *overrides,
    ]))  # fmt: skip
    return setup.build(start_world(recipe.train), recipe, Display(enabled=False))


def probe_choices(folder: Path, precision: str) -> tuple[str, str]:
    """Return the precision, bf16 or fp32, and the convolution method that the trainer's probe chooses at batch size 16."""
    run = article_run(folder, f"train.precision={precision}", "train.global_batch_size=16", "train.duration=1 steps")
    run.watchdog.stop()
    train = run.recipe.train
    return "bf16" if train.precision == "bf16" else "fp32", train.convolutions


def _trainer(folder: Path, batch_size: int, steps: int, precision: str, method: str) -> float:
    """Measure the images per second of the trainer's loop over its last `steps` steps, logging included."""
    from shardstep.trainer import loop

    run = article_run(
        folder, f"train.global_batch_size={batch_size}", f"train.duration={2 * steps} steps",
        f"train.precision={precision}", "train.memory_format=channels_last", f"train.convolutions={method}",
        f"log.every={steps} steps", "checkpoint.every=1000 epochs",
    )  # fmt: skip
    loop.train(run)
    run.watchdog.stop()
    run.saver.wait(lambda: None)
    return float(run.metrics.last_train["samples_per_s"])


def _in_own_process(loop: str, batch_size: int, steps: int, precision: str) -> float:
    """Measure the images per second of launch/benchmarks/bare_loop.py or lightning_loop.py."""
    command = [sys.executable, "-m", f"shardstep.launch.benchmarks.{loop}", *map(str, [batch_size, steps, precision])]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(printed.splitlines()[-1])  # libraries may print before
