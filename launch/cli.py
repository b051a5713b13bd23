"""The command `shardstep`: one subcommand per module of this folder, imported when it is called."""

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import NoReturn

from shardstep.configs.errors import InputError, TrainingFailed, is_out_of_memory
from shardstep.configs.text import printable
from shardstep.launch.entry import INTERRUPTED, raise_if_interrupted, raise_interrupts
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.launchers import adopt_launch

COMMANDS = {
    "recipes": "list the recipes, with their measured results",
    "keys": "explain every key of a recipe: type, default, meaning",
    "train": "train a model from a recipe, or show what would be trained",
    "evaluate": "evaluate a run's or a checkpoint's weights on a test set",
    "submit": "submit a recipe to Slurm",
    "compare": "compare optimizers, or any other keys, under equal budgets",
    "same": "show that training is the same on any number of ranks, or on a CPU and a GPU",
    "shards": "write, verify, index and inspect data sets",
    "checkpoints": "list and verify the checkpoints of a run",
    "watch": "follow a run from its folder",
    "doctor": "check this machine or allocation before a run, with a fix for each problem",
    "report": "write a page about a run, or about several side by side",
    "predict": "predict the classes of image files",
    "export": "export a trained model for use elsewhere, and compare its outputs",
    "bench": "measure loaders, steps, checkpoints, starts, records and scaling",
}
ON_RANKS = ("train", "evaluate", "doctor")
"""The commands whose ranks work together. Any other is refused where a launcher starts it several times."""
# How often OpenMP's idle threads look for work before they sleep. libgomp's own 300,000 keeps a core from the thread that the
# others wait for, where other processes run, too; without spinning (OMP_WAIT_POLICY=PASSIVE) small steps are slow everywhere.
# article_cnn, batch 16, bf16, 2 threads on 2 cores of an Intel Xeon (AMX), torch 2.15, steps/s by spins:
#   beside two busy processes (n = 3)   10,000: 10.4 (8.7 to 10.7)   300,000: 5.7 (4.2 to 7.8)   0: 5.8 (2.6 to 6.8)
#   at real-time priority (n = 5)       10,000: 37 (28 to 41)        300,000: 31 (26 to 47)      0: 25 (21 to 34)
_SPINS = 10_000
_LESS_MEMORY = "a smaller train.max_micro_batch, eval.batch_size or data.resize needs less memory"
_HEAD_START_S = 1.0  # for the message of the rank that failed first
BAD_INPUT, FAILED = 2, 1


def main() -> int:
    """Run the command that this process's arguments name; returns its exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"shardstep {metadata.version('shardstep')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: shardstep COMMAND ...\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:<12} {what}")
        print("\n`shardstep COMMAND --help` lists its options.")
        return 0 if arguments else BAD_INPUT
    name, *rest = arguments
    if name not in COMMANDS:
        from shardstep.configs.components import neighbours

        print(f"shardstep: no command {name!r}; {neighbours(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    code = run(lambda arguments: import_module(f"shardstep.launch.{name}").main(arguments), rest, name)
    if "torch" in sys.modules:
        leave(code)
    return code


def run_script(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of this process, and end the process."""
    code = run(command, sys.argv[1:], Path(sys.argv[0]).stem)
    if "torch" in sys.modules:
        leave(code)
    sys.exit(code)


def run(command: Callable[[list[str]], int], arguments: list[str], name: str | None = None) -> int:
    """Run a command; errors that the user can fix become a message and an exit code, others keep their traceback.

    `name`: of COMMANDS, to refuse one that does not run on ranks where there are several.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks, like stderr does
    # Both are read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # or c10d prints stacks for each rank that is late, or ends early
    try:
        raise_interrupts()
        adopt_launch()
        if name in COMMANDS and name not in ON_RANKS:
            launch_env.check_started_once(name, ON_RANKS)
        try:
            return command(arguments)
        except Exception as error:
            raise_if_interrupted()
            if report := _own_report(error):
                _print_error(report, everywhere=False)
                return FAILED
            raise
    except InputError as error:
        _print_error(f"error: {error}", error.everywhere)
        return BAD_INPUT
    except TrainingFailed as error:
        _print_error(f"failed: {error}", error.everywhere)
        return FAILED
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _print_error(f"error: {_reason(error)}", everywhere=False)  # perhaps only on this node
        return BAD_INPUT
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal and a launcher may both send it
        _print_error("interrupted")
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            prefix = f"rank {launch_env.rank()}: " if launch_env.is_launched() else ""
            reason = (str(error) or "out of memory").splitlines()[0]
            _print_error(f"failed: {prefix}{reason}\n{_LESS_MEMORY}", everywhere=False)
            return FAILED
        from shardstep.trainer.distributed.collectives import is_lost_rank

        if not is_lost_rank(error):
            raise
        time.sleep(_HEAD_START_S)
        _print_error(f"failed: rank {launch_env.rank()} ends because another rank has ended", everywhere=False)
        return FAILED
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a mount that is gone
        if error.errno is None:
            raise
        _print_error(f"failed: {_reason(error)}", everywhere=False)
        return FAILED


def leave(code: int) -> NoReturn:
    """Wait for a checkpoint that is being written, then end the process without Python's shutdown.

    Shutting down an interpreter with torch's threads can abort (seen on a busy machine: "terminate called without an active
    exception"), which would turn a finished run into a failure.
    """
    saver = sys.modules.get("shardstep.trainer.checkpoints.saver")  # not imported: no checkpoint was begun
    for thread in threading.enumerate():
        if saver and thread.name == saver.THREAD_NAME:  # reader threads may wait forever
            thread.join()
    for found in gc.get_objects():
        if type(found) is tempfile.TemporaryDirectory:  # wandb has two, which a normal shutdown would remove
            with contextlib.suppress(OSError):
                found.cleanup()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def page_width() -> int:
    """Return the columns for wrapped text: those of the terminal, at most 120; 80 when piped."""
    return min(shutil.get_terminal_size().columns, 120)


def _own_report(error: Exception) -> str | None:
    """Return what to print of an error that code of the recipe has raised, not ours; None for any other."""
    imported = sys.modules.get("shardstep.configs.imported")
    if imported is None or isinstance(error, InputError | TrainingFailed) or is_out_of_memory(error):
        return None
    text = imported.own_traceback(error)
    if text is None:
        return None
    from shardstep.trainer.distributed.collectives import is_lost_rank

    if is_lost_rank(error):
        return None
    return f"failed: {f'rank {launch_env.rank()}: ' if launch_env.is_launched() else ''}{text}"


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def _print_error(message: str, everywhere: bool = True) -> None:
    """Print to stderr; if every rank has the same message (`everywhere`), only rank 0 prints it."""
    if launch_env.is_first_rank() or not everywhere:
        print(printable(message, keep="\n"), file=sys.stderr, flush=True)
