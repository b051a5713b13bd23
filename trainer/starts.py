"""Each start of a run to starts.json: what was typed, on which hardware, with which versions. Rank 0 writes, reports read."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from shardstep.configs.files import write_whole
from shardstep.trainer import machine
from shardstep.trainer.origin import commit, hardware
from shardstep.trainer.setup import Run

STARTS_NAME = "starts.json"
_CODE = Path(__file__).resolve().parent.parent


def write_start(run: Run, arguments: list[str]) -> None:
    """Add this start to the run's starts.json, after those that its checkpoints know of. Called on rank 0.

    Args:
        run: that is about to train.
        arguments: of `shardstep train`, as they were typed.
    """
    path, known = run.folder / STARTS_NAME, len(run.state.starts) - 1
    parameters = list(run.state.module.parameters())
    start = run.state.starts[-1] | {
        "command": shlex.join(["shardstep", "train", *arguments]),
        "code": commit(_CODE) if (_CODE / ".git").exists() else None,  # not that of what it may be installed into
        "versions": machine.versions(),
        "hardware": hardware(run.accelerator.device),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "micro_steps": run.plan.micro_steps,
        "samples_per_epoch": run.plan.samples_per_epoch,
        "total_steps": run.plan.total_steps,
    }
    try:
        write_whole(path, (json.dumps([*read_starts(run.folder)[:known], start], indent=1) + "\n").encode())
    except OSError as error:
        run.display.warn(f"{path} could not be written, reports will not tell the hardware: {error}")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where they were not written down, or cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        starts = json.loads((folder / STARTS_NAME).read_text())
        if isinstance(starts, list):
            return [start for start in starts if isinstance(start, dict)]
    return []
