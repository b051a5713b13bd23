"""The option --trust-code of commands that open a run's folder, and so run the code that its recipe names."""

import argparse
import sys
from pathlib import Path

from shardstep.configs.text import printable


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust-code to a command that has runs or checkpoints as `run` or `runs`."""
    what = (
        "run the code in the run's folder, although you have not trained with it here, and remember that; read it first"
    )
    parser.add_argument("--trust-code", action="store_true", help=what)


def trust_if_asked(args: argparse.Namespace) -> None:
    """Trust the code of the command's runs from now on, if it was asked for; say which code that is."""
    if not args.trust_code:
        return
    from shardstep.trainer.distributed import launch_env
    from shardstep.trainer.own_code.kept_code import trust_code
    from shardstep.trainer.run_dir import run_dir_of

    paths: list[Path] = args.runs if "runs" in args else [args.run]
    for run_dir in map(run_dir_of, paths):
        told = trust_code(run_dir.config.recipe, run_dir.code_path)
        if told and launch_env.is_first_rank():
            print(printable(f"{run_dir.path}: {told}"), file=sys.stderr)
