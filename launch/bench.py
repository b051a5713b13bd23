"""Measure the loaders and the training step, each beside a plain alternative in the same session.

    shardstep bench loader [--images DIR] [--repeats N]
    shardstep bench step [--repeats N]
    shardstep bench checkpoint [--repeats N]
    shardstep bench scaling [--repeats N] [--cluster NAME] [--workload NAME] [--gpus N,N] [--json]

Figures are medians with their range over the repeats; machines differ and are noisy, so look at the ratios.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from shardstep.launch import bench_scaling
from shardstep.launch.cli import run as run_command


def main(arguments: list[str]) -> int:
    """Run a benchmark and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep bench", description="Measure against plain alternatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser("loader", help="images per second of the loaders, on one core")
    loader.add_argument("--images", type=Path, help="shards to read (default: 5,000 synthetic 32x32 images)")
    step = commands.add_parser("step", help="the trainer against a bare PyTorch loop, on the article's net")
    checkpoint = commands.add_parser("checkpoint", help="steps with and without a checkpoint every 50 of them")
    for command in (loader, step, checkpoint):
        command.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    bench_scaling.add_arguments(
        commands.add_parser("scaling", help="what more ranks give: measured here, and by a model")
    )
    given = parser.parse_args(arguments)
    if given.command == "scaling":
        return bench_scaling.main(given)
    with tempfile.TemporaryDirectory(prefix="shardstep-bench-") as folder:
        {"loader": _loader, "step": _step, "checkpoint": _checkpoint}[given.command](given, Path(folder))
    return 0


# --- loaders ----------------------------------------------------------------------------------------------------------


def _loader(given: argparse.Namespace, folder: Path) -> None:
    import numpy as np
    import torch

    from shardstep.datasets.augment import Normalize, build_transforms
    from shardstep.datasets.batches import OrderConfig, TrainBatches
    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.reader import Reader, StreamReader
    from shardstep.datasets.resident import ResidentReader
    from shardstep.datasets.write import write_shards
    from shardstep.trainer import runtime

    torch.set_num_threads(1)
    runtime.keep_freed_memory()  # as training does
    if given.images is None:
        given.images = folder / "train"
        write_shards("synthetic:5000", "train", given.images)
    shards, device = open_shards(given.images), torch.device("cpu")
    count = shards.manifest.samples
    stream = StreamReader(shards)
    decoded = stream.read(np.arange(count))[0]
    resident = ResidentReader(decoded, torch.from_numpy(shards.labels))
    augment = build_transforms([{"name": "flip", "probability": 0.5}, {"name": "translate", "pixels": 2}])

    def batches(reader: Reader) -> Callable[[], int]:
        made = TrainBatches(
            reader,
            OrderConfig(shards.samples_per_shard, 0, 1, None),
            global_batch_size=min(512, count),
            samples_per_epoch=count,
            rank=0,
            world_size=1,
            max_micro_batch=512,
            transforms=augment,
            normalize=Normalize(
                [0.5] * shards.manifest.channels, [0.25] * shards.manifest.channels, reader.image_shape, device
            ),
            memory_format=torch.channels_last,
            device=device,
            workers=0,
        ).from_position(0, 0)

        def one_epoch() -> int:
            seen = 0
            while seen < count:
                seen += sum(len(micro.labels) for micro in next(made).micro_batches)
            return seen

        return one_epoch

    ids = np.random.default_rng(0).permutation(count)
    rows = {
        "resident: gather, flip, translate, normalise": batches(resident),
        "stream: index, pread, crc32, no decode": lambda: sum(
            1 for sample in ids.tolist() if stream.read_bytes(sample)
        ),
        "stream: decode, flip, translate, normalise": batches(stream),
        "plain webdataset pipeline: decode to numpy by PIL": lambda: _plain_webdataset(shards),
    }
    rates = {name: _repeat(work, given.repeats) for name, work in rows.items()}
    _table("loader, one core", "images/s", rates, reference="plain webdataset pipeline: decode to numpy by PIL")


def _plain_webdataset(shards: "ShardFolder") -> int:  # type: ignore[name-defined] # noqa: F821
    import webdataset

    urls = [str(shards.shard_path(number)) for number in range(len(shards.manifest.shards))]
    return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


# --- the training step ------------------------------------------------------------------------------------------------


def _article_run(folder: Path, *overrides: str) -> "setup.Run":  # type: ignore[name-defined] # noqa: F821
    """A new run of the article's net on synthetic images, which are made in `folder` if they are not there."""
    from shardstep.configs.load import load_recipe
    from shardstep.datasets.write import write_shards
    from shardstep.trainer import runtime, setup
    from shardstep.trainer.check import check_recipe
    from shardstep.trainer.display import Display

    for split, count in (("train", 4096), ("test", 16)):
        if not (folder / split).exists():
            write_shards(f"synthetic:{count}", split, folder / split)
    number = len(list(folder.glob("run*")))
    recipe = check_recipe(load_recipe("article_cnn", [
        f"run.dir={folder / f'run{number}'}", f"data.train={folder / 'train'}", f"data.test={folder / 'test'}",
        "eval.every=1000 epochs", "train.precision=bf16", "train.memory_format=channels_last", *overrides,
    ]))  # fmt: skip
    return setup.build(runtime.start(recipe.train), recipe, Display(enabled=False))


def _step(given: argparse.Namespace, folder: Path) -> None:
    from shardstep.trainer import loop

    def trainer(batch_size: int, steps: int) -> float:
        """Images per second of the real loop over its last `steps` steps, logging included."""
        run = _article_run(
            folder, f"train.global_batch_size={batch_size}", f"train.duration={2 * steps} steps",
            f"log.every={steps} steps", "checkpoint.every=1000 epochs",
        )  # fmt: skip
        loop.train(run)
        run.watchdog.stop()
        return float(run.metrics.last_train["samples_per_s"])

    for batch_size, steps in ((16, 30), (256, 5)):
        rates: dict[str, list[float]] = {"bare loop": [], "shardstep": []}
        for _ in range(given.repeats):  # in turn, so that a machine's moods meet both
            rates["bare loop"].append(_bare_loop(batch_size, steps))
            rates["shardstep"].append(trainer(batch_size, steps))
        ratios = [ours / theirs for ours, theirs in zip(rates["shardstep"], rates["bare loop"], strict=True)]
        _table(f"article_cnn, Adam, bf16, batch {batch_size}", "images/s", rates, reference="bare loop")
        print(
            f"  median of the paired ratios {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}\n"
        )


def _checkpoint(given: argparse.Namespace, folder: Path) -> None:
    from shardstep.trainer import loop

    def steps_per_s(checkpoints: str) -> float:
        """Over 200 steps of about 50 ms, without the last save, for which a run waits."""
        run = _article_run(
            folder, "train.duration=201 steps", "log.every=1000 steps", f"checkpoint.every={checkpoints}"
        )
        marks = []
        run.display.advance = lambda step: marks.append(time.perf_counter())
        loop.train(run)
        run.watchdog.stop()
        run.saver.wait(lambda: None)
        return (len(marks) - 1) / (marks[-1] - marks[0])

    rates: dict[str, list[float]] = {"no checkpoint": [], "a checkpoint every 50 steps": []}
    for _ in range(given.repeats):  # in turn, so that a machine's moods meet both
        rates["no checkpoint"].append(steps_per_s("1000 epochs"))
        rates["a checkpoint every 50 steps"].append(steps_per_s("50 steps"))
    ratios = [with_saves / without for without, with_saves in zip(*rates.values(), strict=True)]
    _table("article_cnn, Adam, bf16, batch 16, 200 steps", "steps/s", rates, reference="no checkpoint")
    print(f"  median of the paired ratios {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}\n")


def _bare_loop(batch_size: int, steps: int) -> float:
    """Images per second of what one would write by hand: no ranks, no checkpoints, no metrics."""
    import torch

    from shardstep.trainer.models.article_cnn import article_cnn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = article_cnn((3, 32, 32), 10).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    images = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (4096,), device=device)
    began = 0.0
    for step in range(2 * steps):
        if step == steps:
            began = time.perf_counter()
        chosen = torch.randint(0, 4096, (batch_size,), device=device)
        batch = (images[chosen].float() / 255 - 0.1307) / 0.3081
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(batch)
        loss = torch.nn.functional.cross_entropy(outputs.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return steps * batch_size / (time.perf_counter() - began)


def _repeat(work: Callable[[], int], repeats: int) -> list[float]:
    work()
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - began))
    return rates


def _table(title: str, unit: str, rates: dict[str, list[float]], reference: str) -> None:
    import os
    import platform

    import torch

    base = statistics.median(rates[reference])
    print(f"{title} ({platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__})")
    print(f"  {'':<52}{unit:>10}{'range':>20}{'ratio':>8}")
    for name, values in rates.items():
        median = statistics.median(values)
        span = f"{_figure(min(values))} to {_figure(max(values))}"
        print(f"  {name:<52}{_figure(median):>10}{span:>20}{median / base:>8.2f}")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
