"""starts.json: the command, hardware and versions of each start of a run. Rank 0 writes it for reports."""

import json
import shlex
from pathlib import Path

from shardstep.configs.files import write_atomically
from shardstep.trainer import machine
from shardstep.trainer.origin import commit, hardware
from shardstep.trainer.run import Run

_CODE = Path(__file__).resolve().parent.parent


def write_start(run: Run, arguments: list[str]) -> None:
    """Add this start to the run's starts.json, after the starts that its checkpoint knows. Called on rank 0."""
    path, known = run.dir.starts_path, len(run.state.starts) - 1
    parameters = list(run.state.module.parameters())
    start = run.state.starts[-1] | {
        "command": shlex.join(["shardstep", "train", *arguments]),
        "code": commit(_CODE) if (_CODE / ".git").exists() else None,  # not that of a repository it is installed into
        "versions": machine.versions(),
        "hardware": hardware(run.accelerator.device),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "micro_steps": run.plan.micro_steps,
        "samples_per_epoch": run.plan.samples_per_epoch,
        "total_steps": run.plan.total_steps,
    }
    try:
        write_atomically(path, (json.dumps([*run.dir.starts[:known], start], indent=1) + "\n").encode())
    except OSError as error:
        run.display.warn(f"{path} could not be written, so reports will not show the hardware: {error}")
