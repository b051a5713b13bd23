"""What this process may use: cores, by CPU affinity and cgroup quota, and the threads that a person asks for."""

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardstep.configs.text import count

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Cores:
    """How many cores this process may keep busy, of how many the machine has, and what keeps it from the others, if any."""

    count: int
    installed: int
    limit: str

    def __str__(self) -> str:
        """Such as "8 cores", or "2 of 8 cores: cgroup quota of 2"."""
        if not self.limit:
            return count(self.count, "core")
        return f"{self.count} of {count(self.installed, 'core')}: {self.limit}"


def usable_cores(process: Path = _PROCESS) -> Cores:
    """Return a process's cores: the smaller of its CPU affinity and its quota, which is rounded down, but at least 1.

    More threads than the quota allows spend it sooner, in part on waiting for each other, then all stop until its next one:
    article_cnn, batch 16, bf16 (2 cores of an Intel Xeon with AMX, torch 2.15, n = 1) took 35 steps/s with 1 thread and 29
    with 2 under a quota of 1.5, 32 and 22 under one of 1.

    Args:
        process: its folder in /proc, by default this process's.
    """
    pid = int(process.name) if process.name.isdecimal() else 0
    bound, installed, quota = len(os.sched_getaffinity(pid)), os.cpu_count() or 1, cgroup_quota(process)
    if quota is not None and max(1, math.floor(quota)) < bound:
        return Cores(max(1, math.floor(quota)), installed, f"cgroup quota of {quota:.3g}")
    return Cores(bound, installed, "CPU affinity" if bound < installed else "")


def pool_threads() -> int:
    """Return the threads for a pool that reads or writes images: one per core, or OMP_NUM_THREADS if a person gave fewer."""
    return min(usable_cores().count, asked_threads(os.environ) or sys.maxsize)


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Return the threads that a person asks for with OMP_NUM_THREADS, or None; libgomp reports a number that is none.

    torchrun and accelerate launch set it to 1 for their ranks if it is unset: their own environment has what a person set.
    """
    given = (parent_environment() if has_agent(environment) else environment).get("OMP_NUM_THREADS", "")
    outermost = given.partition(",")[0].strip()  # "4,2": 4, and 2 in each of a nested loop
    return int(outermost) if outermost.isdecimal() else None


def has_agent(environment: Mapping[str, str]) -> bool:
    """Check whether torchrun or accelerate launch started the process with this environment."""
    return "TORCHELASTIC_RUN_ID" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def parent_environment() -> dict[str, str]:
    """Return the environment with which this process's parent was started; empty if it cannot be read."""
    try:
        text = Path(f"/proc/{os.getppid()}/environ").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, _, value in pairs}


def cgroup_quota(process: Path = _PROCESS) -> float | None:
    """Return the CPU time per second of wall time that the cgroups of a process allow, or None if they do not limit it.

    Reads cgroup v1 and v2. A group is limited by its ancestors, too; those outside a container cannot be seen from within.

    Args:
        process: its folder in /proc.
    """
    quotas = [quota for folder in _cgroup_folders(process) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(process: Path) -> list[Path]:
    """Return the folders of the groups that control a process's CPU time, and those of all their ancestors."""
    try:
        groups = (process / "cgroup").read_text().splitlines()  # "4:cpu,cpuacct:/batch/job7"; of v2 "0::/batch/job7"
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # no /proc
        return []
    path_of = {controllers: path for line in groups for _, controllers, path in [line.split(":", 2)]}
    version_1 = next((path for controllers, path in path_of.items() if "cpu" in controllers.split(",")), None)
    folders = []
    for line in mounts:
        mount, _, source = line.partition(" - ")
        root, mount_point = map(_unescaped, mount.split()[3:5])
        kind, _, options = source.split(" ", 2)
        path = path_of.get("") if kind == "cgroup2" else version_1
        if path is None or not (kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))):
            continue
        # A container may see only its own group, mounted from `root`, and in a cgroup namespace the path leads nowhere.
        inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) and ".." not in path else Path()
        folders += [Path(mount_point) / part for part in (inside, *inside.parents)]
    return folders


def _unescaped(field: str) -> str:
    r"""Return a field of mountinfo, where a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quota_of(folder: Path) -> float | None:
    """Return a group's own quota, in CPUs."""
    try:
        if (folder / "cpu.max").exists():
            # "150000 100000", in us; "max 100000" has no limit
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # the root of a hierarchy has none
        return None
