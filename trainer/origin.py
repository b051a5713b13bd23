"""Where a run comes from: the version of the code, and the hardware. For reports and trackers."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from shardstep.trainer import machine

_GIT_S = 5.0


def facts_of(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, commit, and the hardware of rank 0."""
    where = {"host": platform.node(), "ranks": world_size}
    return {"versions": machine.versions(), "commit": commit(), "hardware": hardware(device) | where}


def hardware(device: torch.device) -> dict[str, Any]:
    """This machine and the device of this rank, in numbers and names."""
    cpu = machine.read_cpu()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu.name,
        "vectors": cpu.vectors,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": machine.memory_bytes(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def commit() -> str | None:
    """The git commit of this code, or of the folder one works in if it is an installed package; + says that files changed."""
    code = Path(__file__).resolve().parent.parent
    folder = code if (code / ".git").exists() else Path.cwd()
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
