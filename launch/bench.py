"""Measure the loaders, the training step and the start against plain alternatives in the same session.

    shardstep bench loader [--images DIR|photos] [--clock cpu]
    shardstep bench step [--batches SIZE ...]
    shardstep bench convolutions [--precision bf16|fp32] [--images N] [--layers IN,OUT,SIDE ...]
    shardstep bench checkpoint
    shardstep bench startup [section.key=value ...] [--clock cpu]
    shardstep bench record [RECIPE [section.key=value ...]]
    shardstep bench scaling [--cluster NAME] [--workload NAME] [--gpus N,N]

All take --repeats N and --json; except for scaling, --json takes a path, or - for stdout. Each is a module of
launch/benchmarks/ with `add_options(parser)` and `measure(args, folder)`, which returns tables. An alternative that is not
installed is left out with a note.
"""

import argparse
import tempfile
from importlib import import_module
from pathlib import Path

from shardstep.configs.files import check_output_file
from shardstep.launch.benchmarks import bench_scaling
from shardstep.launch.benchmarks.bench_tables import report, whole_number
from shardstep.launch.cli import run_script

BENCHMARKS = {
    "loader": "images per second of the loaders, on one core",
    "step": "the trainer against a bare PyTorch loop on the article's net",
    "convolutions": "single layers by each method of train.convolutions, on a CPU",
    "checkpoint": "steps with and without a checkpoint every 50 steps",
    "startup": "from the command to the first optimizer step",
    "record": "a recipe with several seeds, timed like a speed record",
}


def main(arguments: list[str]) -> int:
    """Run a benchmark and print its tables; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep bench", description="Measure against plain alternatives.")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: import_module(f"shardstep.launch.benchmarks.bench_{name}") for name in BENCHMARKS}
    for name, what in BENCHMARKS.items():
        command = commands.add_parser(name, help=what, description=modules[name].__doc__)
        command.add_argument("--repeats", "--runs", type=whole_number, default=7, help="(default: %(default)s)")
        command.add_argument("--json", metavar="PATH", help="write the figures to this file as JSON; - is stdout")
        modules[name].add_options(command)
    scaling = commands.add_parser("scaling", help="the speedup of more ranks: measured here, predicted for a cluster")
    bench_scaling.add_arguments(scaling)
    args, left = parser.parse_known_args(arguments)
    if left and not (hasattr(args, "overrides") and all("=" in text and not text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # argparse accepts positional arguments only before options
        args.overrides += left
    if args.command == "scaling":  # prints a model beside the figures, not tables
        return bench_scaling.main(args)
    if args.json not in (None, "-"):
        check_output_file("--json", Path(args.json))
    with tempfile.TemporaryDirectory(prefix="shardstep-bench-") as folder:
        report(f"bench {args.command}", modules[args.command].measure(args, Path(folder)), args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
