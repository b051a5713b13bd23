"""Where a run comes from: versions, git commit and hardware, for reports and trackers."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from shardstep.configs.cores import usable_cores
from shardstep.trainer import machine

_GIT_S = 5.0


def facts_of(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return versions, the commit of the current folder, and the hardware of this rank."""
    where = {"host": platform.node(), "ranks": world_size}
    return {"versions": machine.versions(), "commit": commit(Path.cwd()), "hardware": hardware(device) | where}


def hardware(device: torch.device) -> dict[str, Any]:
    """Return facts about this machine and this rank's device."""
    cpu = machine.read_cpu()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu.name,
        "vectors": cpu.vectors,
        "cores": usable_cores().count,
        "threads": torch.get_num_threads(),
        "memory_bytes": machine.memory_bytes(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


@functools.cache
def commit(folder: Path) -> str | None:
    """Return the git commit of a folder, with + if files were changed; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
