"""Measure the speedup of a second rank here, and predict that of more ranks: `shardstep bench scaling`.

One rank with two threads and two gloo ranks with one thread each take turns on the article's net. Then follow the parts of a
step, and the model of docs/scaling.md: first compared with the measurement, then for a cluster from a list.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.launch.cli import leave
from shardstep.launch.ranks import TRAIN_SCRIPT, start_ranks

if TYPE_CHECKING:
    from shardstep.launch.benchmarks.scaling_model import Prediction

COLUMNS = ["batch", "ranks", "share", "compute", "all-reduce", "waiting", "images/s", "efficiency"]
_TARGET = 0.95  # of the images/s of one rank with two threads
_REDUCED_BYTES = (4, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
_REDUCTIONS = 30
_BYTES_PER_GRADIENT = 4
_ONE, _TWO, _APART = "1 rank x 2 threads", "2 ranks x 1 thread", "2 runs x 1 thread, apart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add, presets = parser.add_argument, "step to predict: record94, record94_captured, resnet50 (default: %(default)s)"
    add("--repeats", type=int, default=5, help="of every measurement (default: %(default)s)")
    add("--steps", type=int, default=3, help="timed steps of each run (default: %(default)s)")
    add("--batch", type=int, default=512, help="global batch size (default: %(default)s)")
    add("--all-reduce", choices=("buckets", "flat"), default="buckets", help="like train.all_reduce")
    add("--cluster", default="a100", help="cluster to predict for: a100, h100 (default: %(default)s)")
    add("--workload", default="record94", help=presets)
    add("--gpus", default="1,8,64,512", help="numbers of ranks to predict (default: %(default)s)")
    add("--predict-only", action="store_true", help="measure nothing")
    add("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Measure, predict and print; return the exit code.

    Raises:
        InputError: an option is invalid.
        TrainingFailed: a timed run failed.
    """
    from shardstep.configs.text import table
    from shardstep.launch.benchmarks.scaling_model import prediction_rows

    ranks = _check(args)
    found: dict[str, Any] = {} if args.predict_only else _measure(args)
    rows = prediction_rows(args.workload, args.cluster, ranks)
    if args.json:
        predictions = [{"batch": batch, "step_s": row.step_s, **asdict(row)} for batch, row in rows]
        found |= {"cluster": args.cluster, "workload": args.workload, "predictions": predictions}
        print(json.dumps(found), flush=True)
        return 0
    if found:
        _print_measured(args, found)
    print(f"model: {args.workload} on {args.cluster} (docs/scaling.md), from published figures")
    print("\n".join(table(COLUMNS, cells(rows))))
    print("share: images of a rank; compute, all-reduce and waiting for it: ms per step")
    too_many = [count for count in ranks if ("kept", count) not in [(batch, row.ranks) for batch, row in rows]]
    if too_many:
        print(f"no prediction with a kept batch on {', '.join(map(str, too_many))} ranks: it has fewer images")
    return 0


def cells(rows: "Sequence[tuple[str, Prediction]]") -> list[list[str]]:
    """Format predictions as cells for COLUMNS: the share is a rank's images of a step, times are in ms."""
    return [
        [
            batch, str(row.ranks), str(row.images_per_rank),
            *(f"{1000 * seconds:.2f}" for seconds in (row.compute_s, row.all_reduce_s, row.exposed_s)),
            f"{row.images_per_s:,.0f}", f"{row.efficiency:.1%}",
        ]
        for batch, row in rows
    ]  # fmt: skip


def _check(args: argparse.Namespace) -> list[int]:
    from shardstep.configs.components import neighbours
    from shardstep.launch.benchmarks.scaling_model import CLUSTERS, WORKLOADS

    problems = [
        f"--{key} {value}: {neighbours(value, known)}"
        for key, value, known in (("cluster", args.cluster, CLUSTERS), ("workload", args.workload, WORKLOADS))
        if value not in known
    ]
    least = {"repeats": 1, "steps": 1, "batch": 2}
    found = {key: getattr(args, key) for key in least}
    problems += [f"--{key} {found[key]} must be at least {least[key]}" for key in least if found[key] < least[key]]
    parts = args.gpus.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        problems.append(f"--gpus {args.gpus} must be whole numbers from 1, separated by commas, such as 8,64,512")
    if problems:
        raise InputError.from_problems("shardstep bench scaling", problems)
    return [int(part) for part in parts]


# --- this machine -----------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure this machine: images/s of each way, the parts of a step, and the model's prediction for two ranks."""
    from importlib import metadata

    from shardstep.datasets.write import write_shards
    from shardstep.launch.benchmarks import scaling_model
    from shardstep.trainer import machine
    from shardstep.trainer.run_dir import RunDir

    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # inherited by the runs: two cores for each way
    if len(cores) < 2:
        print("note: only one core: two ranks share it, so the ratio is meaningless", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="shardstep-bench-") as name:
        folder = Path(name)
        for split, count in (("train", 4 * args.batch), ("test", 16)):
            write_shards(f"synthetic:{count}", split, folder / split)
        _train(args, folder, {})  # to warm up files, and to resolve `auto` once for all runs
        config = RunDir(folder / "run").config.recipe.train
        options = {key: getattr(config, key) for key in ("precision", "memory_format", "convolutions")}
        rates: dict[str, list[float]] = {_ONE: [], _TWO: [], _APART: []}
        for _ in range(args.repeats):  # in turn, so that all meet the same load of the machine
            rates[_ONE].append(_train(args, folder, options))
            rates[_TWO].append(_train(args, folder, options, "--nproc", "2"))
            rates[_APART].append(_train_apart(args, folder, options, cores))
        reductions = _time_all_reduces(folder)
        gradients = _count_gradients(folder)

    ratios = [two / one for one, two in zip(rates[_ONE], rates[_TWO], strict=True)]
    link = scaling_model.fit_link(reductions, ranks=2)
    share_s = args.batch / statistics.median(rates[_APART])  # of a step on half the batch, on an equally busy machine
    workload = scaling_model.Workload(
        args.batch,
        _BYTES_PER_GRADIENT * gradients,
        image_s=share_s / -(-args.batch // 2),
        bucket_bytes=None if args.all_reduce == "flat" else float(1 << 20),
    )
    here = scaling_model.Cluster(2, link, link, start_s=0.0)
    predicted_s = scaling_model.predict(workload, here, 2).step_s
    measured_s = args.batch / statistics.median(rates[_TWO])
    two_ranks = {"predicted_step_s": predicted_s, "measured_step_s": measured_s, "error": predicted_s / measured_s - 1}
    host = {"cpu": machine.read_cpu().name, "cores": len(cores)}
    return {
        "machine": host | {"torch": metadata.version("torch"), "platform": platform.platform()},
        "settings": options | {"batch": args.batch, "all_reduce": args.all_reduce, "steps": args.steps},
        "images_per_s": rates,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "target": _TARGET},
        "parts": {
            "compute_s_per_image": workload.image_s,
            "gradient_bytes": workload.gradient_bytes,
            "all_reduce_s": {str(size): seconds for size, seconds in reductions.items()},
            "latency_s": link.latency_s,
            "bytes_per_s": link.bytes_per_s,
        },
        "two_ranks": two_ranks,
    }


def _train(args: argparse.Namespace, folder: Path, options: dict[str, str], *more: str) -> float:
    return _finish([_start(args, folder, "run", options, *more)], folder)


def _train_apart(args: argparse.Namespace, folder: Path, options: dict[str, str], cores: list[int]) -> float:
    """Run half the batch twice at once, each on its own core: two ranks without communication."""
    half = f"train.global_batch_size={-(-args.batch // 2)}"
    halves = [_start(args, folder, f"run{place}", options, half, core=cores[place % len(cores)]) for place in (0, 1)]
    return _finish(halves, folder)


def _start(
    args: argparse.Namespace, folder: Path, name: str, options: dict[str, str], *more: str, core: int | None = None
) -> tuple[str, "subprocess.Popen[str]"]:
    overrides = [
        f"run.dir={folder / name}", "run.resume=never", f"data.train={folder / 'train'}", f"data.test={folder / 'test'}",
        "data.mode=resident", f"train.global_batch_size={args.batch}", f"train.duration={2 * args.steps} steps",
        f"log.every={args.steps} steps", "eval.every=1000 epochs", "checkpoint.every=1000 epochs", "train.device=cpu",
        f"train.all_reduce={args.all_reduce if '--nproc' in more else 'buckets'}",
        *(f"train.{key}={value}" for key, value in options.items()), *more,
    ]  # fmt: skip
    pin = [] if core is None else ["taskset", "--cpu-list", str(core)]
    command = [*pin, sys.executable, str(TRAIN_SCRIPT), "article_cnn", *overrides]
    return name, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(started: list[tuple[str, "subprocess.Popen[str]"]], folder: Path) -> float:
    """Wait for runs; return their total images per second over their last logged steps."""
    from shardstep.trainer.run_dir import RunDir

    total = 0.0
    ended = [(name, process, process.communicate()[1]) for name, process in started]  # all, before an error is raised
    for name, process, errors in ended:
        if process.returncode:
            last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise TrainingFailed(f"a timed run failed: {last}")
        total += [line["samples_per_s"] for line in RunDir(folder / name).metrics() if line["kind"] == "train"][-1]
    return total


def _count_gradients(folder: Path) -> int:
    from safetensors.numpy import load_file

    from shardstep.trainer.run_dir import RunDir

    weights = load_file(RunDir(folder / "run").weights_path)
    return sum(value.size for value in weights.values())  # the article's net: all are trained


def _time_all_reduces(folder: Path) -> dict[int, float]:
    """Measure the median seconds of an all-reduce between two ranks here, by size in bytes."""
    path = folder / "all_reduces.json"
    code = start_ranks(2, [sys.executable, __file__, str(path)])
    if code:
        raise TrainingFailed(f"the ranks that time all-reduces failed with exit code {code}")
    return {int(size): seconds for size, seconds in json.loads(path.read_text()).items()}


def _time_as_rank(path: Path) -> int:
    """Time all-reduces as one of two ranks; rank 0 writes the medians to `path`."""
    from shardstep.configs.schema import TrainConfig
    from shardstep.trainer.distributed.collectives import time_all_reduce
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.stopping.stop_requests import HELD_BACK

    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)  # start_ranks has blocked them
    world = start_world(TrainConfig(device="cpu"))
    medians = {size: statistics.median(time_all_reduce(world, size, _REDUCTIONS)) for size in _REDUCED_BYTES}
    if world.is_main_process:
        path.write_text(json.dumps(medians))
    world.wait_for_everyone()
    return 0


def _print_measured(args: argparse.Namespace, found: dict[str, Any]) -> None:
    from shardstep.configs.text import table

    host, ratio, parts, two = found["machine"], found["ratio"], found["parts"], found["two_ranks"]
    print(
        f"article_cnn, {found['settings']['precision']}, global batch {args.batch}, {args.all_reduce} "
        f"({host['cpu']}, {host['cores']} cores, torch {host['torch']}; {time.strftime('%Y-%m-%d')})"
    )
    rows = [
        [f"  {name}", f"{statistics.median(rates):,.1f}", f"{min(rates):,.1f} to {max(rates):,.1f}"]
        for name, rates in found["images_per_s"].items()
    ]
    print("\n".join(table([f"  n = {args.repeats}", "images/s", "range"], rows, gap="  ")))
    print(
        f"  {_TWO} / {_ONE}: median of the paired ratios {ratio['median']:.3f}, {ratio['min']:.3f} to {ratio['max']:.3f} "
        f"(target {_TARGET})\n"
    )
    compute = f"{1e3 * parts['compute_s_per_image']:.3f} ms per image"
    print(f"parts of a step on two ranks\n  compute      {compute}, on one thread beside the other rank's")
    print(f"  gradients    {parts['gradient_bytes']:,.0f} bytes")
    print(f"  all-reduce   {1e6 * parts['latency_s']:,.0f} us per message, {parts['bytes_per_s'] / 1e9:.2f} GB/s")
    for size, seconds in parts["all_reduce_s"].items():
        print(f"               {int(size):>12,} bytes in {1e3 * seconds:.3f} ms")
    print(
        f"  a step       {two['predicted_step_s']:.3f} s predicted, {two['measured_step_s']:.3f} s measured: "
        f"{two['error']:+.1%}\n"
    )


if __name__ == "__main__":
    leave(_time_as_rank(Path(sys.argv[1])))
