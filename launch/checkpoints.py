"""List and verify the checkpoints of a run.

    shardstep checkpoints list RUN_DIR
    shardstep checkpoints verify RUN_DIR

`verify` reads every byte and names what is damaged; it ends with 2 if anything is.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.launch.cli import run as run_command
from shardstep.trainer.checkpoints.checkpoint_files import list_checkpoints, problems_of, read_manifest


def main(arguments: list[str]) -> int:
    """List or verify; returns the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep checkpoints", description="List and verify a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", "steps, sizes and times"), ("verify", "read every byte against the manifests")):
        commands.add_parser(name, help=what).add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(arguments)

    folder = args.run / "checkpoints"
    found = list_checkpoints(folder)
    if not found:
        cause = "" if folder.is_dir() else f": {args.run} is no run's folder"
        raise InputError(f"there is no checkpoint in {folder}{cause}")
    damaged = []
    for path in found:
        problems = problems_of(path) if args.command == "verify" else []
        damaged += [f"{path}: {problem}" for problem in problems]
        print(
            f"{path.name}  {_figures(path)}{'  damaged' if problems else '  whole' if args.command == 'verify' else ''}"
        )
    if damaged:
        raise InputError.from_problems(f"{folder} has damage, which a resumed run will pass over", damaged)
    return 0


def _figures(path: Path) -> str:
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    total = sum(size for size, _ in manifest["files"].values())
    written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    ranks = manifest["world_size"]
    return f"{total / 1e6:8,.1f} MB  {written}  {ranks} rank{'s' * (ranks > 1)}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
