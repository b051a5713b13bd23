"""The command `shardstep`: a subcommand per module of this folder, each imported when it is called."""

import contextlib
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module, metadata
from typing import NoReturn

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.trainer.distributed import launch_env

COMMANDS = {
    "train": "train a model from a recipe",
    "evaluate": "evaluate a run's or a checkpoint's weights on a test set",
    "submit": "submit a recipe to Slurm",
    "compare": "compare optimizers, or any other keys, under equal budgets",
    "same": "show that a run is the same on any number of ranks",
    "shards": "write, verify, index and inspect data sets",
    "checkpoints": "list and verify the checkpoints of a run",
    "watch": "show how a run is doing, from its folder",
    "doctor": "look whether a run would go well here, and how to mend what would break it",
    "report": "make a page of a run, or of several side by side",
    "predict": "predict the classes of image files",
    "export": "write a trained model for use elsewhere, and compare it",
    "bench": "measure loaders, steps, checkpoints, starts, records and scaling",
}
_LESS_MEMORY = "less memory is needed by a smaller train.max_micro_batch, eval.batch_size or data.resize of the recipe"
_FIRST_WORD_S = 1.0  # for the rank whose failure it was
BAD_INPUT, FAILED, STOPPED, INTERRUPTED = 2, 1, 85, 130


def main() -> int:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"shardstep {metadata.version('shardstep')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: shardstep COMMAND ...\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:<12} {what}")
        print("\n`shardstep COMMAND --help` says more.")
        return 0 if arguments else BAD_INPUT
    name, *rest = arguments
    if name not in COMMANDS:
        from shardstep.configs.components import neighbours

        print(f"shardstep: no command {name!r}; {neighbours(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    code = run(import_module(f"shardstep.launch.{name}").main, rest)
    if "torch" in sys.modules:
        leave(code)
    return code


def run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; what a person can mend becomes a message and an exit code, other errors keep their traceback."""
    try:
        return command(arguments)
    except InputError as error:
        _tell(f"error: {error}", error.everywhere)
        return BAD_INPUT
    except TrainingFailed as error:
        _tell(f"failed: {error}")
        return FAILED
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _tell(f"error: {_reason(error)}", everywhere=False)  # perhaps of this rank's node alone
        return BAD_INPUT
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            whose = f"rank {launch_env.rank()}: " if launch_env.is_launched() else ""
            reason = (str(error) or "out of memory").splitlines()[0]
            _tell(f"failed: {whose}{reason}\n{_LESS_MEMORY}", everywhere=False)
            return FAILED
        if not _lost_rank(error):
            raise
        time.sleep(_FIRST_WORD_S)
        _tell(f"failed: rank {launch_env.rank()} ends, because another rank has", everywhere=False)
        return FAILED
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a mount that is gone
        if error.errno is None:
            raise
        _tell(f"failed: {_reason(error)}", everywhere=False)
        return FAILED


def leave(code: int) -> NoReturn:
    """End the process at once, when a checkpoint that is being written is done.

    Taking an interpreter with torch's threads apart can abort (seen on a busy machine: "terminate called without an active
    exception"), and would make a failure of a run that is finished and safe.
    """
    from shardstep.trainer.checkpoints.saver import THREAD_NAME

    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:  # readers may wait for work for ever
            thread.join()
    for thing in gc.get_objects():
        if type(thing) is tempfile.TemporaryDirectory:  # a library's, to be removed at a normal end: wandb has two
            with contextlib.suppress(OSError):
                thing.cleanup()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _lost_rank(error: Exception) -> bool:
    from shardstep.trainer.distributed.collectives import is_lost_rank

    return is_lost_rank(error)


def _tell(message: str, everywhere: bool = True) -> None:
    """Print to stderr; of a message that every rank has, rank 0 speaks for all."""
    if launch_env.is_first_rank() or not everywhere:
        print(message, file=sys.stderr, flush=True)
