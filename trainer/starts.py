"""starts.json: the command, hardware and versions of each start of a run. Rank 0 writes it, and compares with the last."""

import json
import shlex
from pathlib import Path
from typing import Any

from shardstep.configs.files import write_atomically
from shardstep.configs.text import count
from shardstep.trainer import machine
from shardstep.trainer.origin import commit, hardware
from shardstep.trainer.run import Run

_CODE = Path(__file__).resolve().parent.parent


def write_start(run: Run, arguments: list[str]) -> None:
    """Add this start to the run's starts.json, after those that its checkpoint knows; warn if it rounds otherwise. Rank 0."""
    path, earlier = run.dir.starts_path, run.dir.starts[: len(run.state.starts) - 1]
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
    changes = rounding_changes(earlier[-1], start) if earlier else []
    if changes:
        run.display.warn(
            f"resumed with {' and '.join(changes)}: the result will differ in rounding from that of an undisturbed run"
        )
    try:
        write_atomically(path, (json.dumps([*earlier, start], indent=1) + "\n").encode())
    except OSError as error:
        run.display.warn(f"{path} could not be written, so reports will not show the hardware: {error}")


def rounding_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences of two starts on as many ranks that make sums round otherwise: threads, processor, torch."""
    if before.get("world_size") != now["world_size"]:  # rounds otherwise anyway
        return []
    pairs = zip(_rounding_facts(before), _rounding_facts(now), strict=True)
    return [f"{new} instead of {old}" for old, new in pairs if old and new and old != new]


def _rounding_facts(start: dict[str, Any]) -> tuple[str, str, str]:
    """Return a start's threads, if it computes on them, its processor and its torch; "" for what it does not say."""
    found, torch_version = start.get("hardware", {}), start.get("versions", {}).get("torch")
    threads, gpu = found.get("threads"), found.get("gpu")
    return (
        count(threads, "thread") if threads and not gpu else "",
        gpu or ", ".join(filter(None, (found.get("cpu"), found.get("vectors")))),
        f"torch {torch_version}" if torch_version else "",
    )
