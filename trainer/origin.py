"""Where a run comes from: the version of the code, and the hardware. What trackers keep beside the recipe."""

import contextlib
import os
import platform
import subprocess
from typing import Any

import torch

from shardstep.trainer import machine

_GIT_S = 5.0


def facts_of(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, the commit of the folder one works in, and the hardware of rank 0."""
    hardware: dict[str, Any] = {
        "host": platform.node(),
        "cpu": machine.read_cpu().name,
        "cores": os.cpu_count(),
        "memory_gb": round(machine.memory_bytes() / 1e9),
        "ranks": world_size,
        "threads_per_rank": torch.get_num_threads(),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {"versions": machine.versions(), "commit": commit(), "hardware": hardware}


def commit() -> str | None:
    """The git commit of the folder one works in, with + where files were changed; None if it is no repository."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S)
        return answer.stdout.strip() or None
    return None
