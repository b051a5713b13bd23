"""List and verify the checkpoints of a run.

    shardstep checkpoints list RUN_DIR
    shardstep checkpoints verify RUN_DIR

`verify` reads every byte and reports what is damaged; it exits with 2 if anything is.
"""

import argparse
from datetime import datetime
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.launch.cli import run_script
from shardstep.trainer.checkpoints.checkpoint_files import problems_of, read_manifest
from shardstep.trainer.run_dir import RunDir


def main(arguments: list[str]) -> int:
    """List or verify; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep checkpoints", description="List and verify a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", "steps, sizes and times"), ("verify", "read every byte against the manifests")):
        commands.add_parser(name, help=what).add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(arguments)

    run = RunDir(args.run)
    if not run.checkpoints:
        cause = "" if run.checkpoints_path.is_dir() else f": {args.run} is not a run's folder"
        raise InputError(f"there is no checkpoint in {run.checkpoints_path}{cause}")
    damaged = []
    for path in run.checkpoints:
        problems = problems_of(path) if args.command == "verify" else []
        damaged += [f"{path}: {problem}" for problem in problems]
        verdict = "" if args.command == "list" else "  damaged" if problems else "  intact"
        print(f"{path.name}  {_figures(path)}{verdict}")
    if damaged:
        raise InputError.from_problems(
            f"{run.checkpoints_path} has damaged checkpoints, which a resumed run skips", damaged
        )
    return 0


def _figures(path: Path) -> str:
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    total = sum(size for size, _ in manifest["files"].values())
    written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    return f"{total / 1e6:8,.1f} MB  {written}  {count(manifest['world_size'], 'rank')}"


if __name__ == "__main__":
    run_script(main)
