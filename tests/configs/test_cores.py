"""The cores that a process may keep busy, under cgroups v1 and v2, real and written by hand."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardstep.configs.cores import Cores, cgroup_quota, pool_threads, usable_cores

V2, V1 = "cgroup2 cgroup2 rw,nsdelegate", "cgroup cgroup rw,cpu,cpuacct"
V1_OF_MEMORY = "cgroup cgroup rw,memory"


def process(folder: Path, groups: list[str], mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
    """A folder like /proc/self: its groups; root, folder and source of each mount; and the files below these folders."""
    folder.mkdir()
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"]
    for root, place, source in mounts:
        escaped = str(folder / place).replace(" ", r"\040")
        lines.append(f"30 22 0:27 {root} {escaped} rw,nosuid shared:4 - {source}")
    (folder / "mountinfo").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        pytest.param(["0::/a/b"], [("/", "cg", V2)], {"cg/a/b/cpu.max": "150000 100000\n"}, 1.5, id="v2"),
        pytest.param(["0::/a/b"], [("/", "cg", V2)], {"cg/a/b/cpu.max": "max 100000\n"}, None, id="v2 without a limit"),
        pytest.param(
            ["0::/a/b"],
            [("/", "cg", V2)],
            {"cg/a/b/cpu.max": "max 100000\n", "cg/a/cpu.max": "20000 10000\n"},
            2,
            id="v2, of an ancestor",
        ),
        pytest.param(
            ["0::/a/b"],
            [("/", "cg", V2)],
            {"cg/a/b/cpu.max": "50000 100000\n", "cg/a/cpu.max": "400000 100000\n"},
            0.5,
            id="v2, the smaller one",
        ),
        pytest.param(["0::/"], [("/", "cg", V2)], {"cg/cpu.max": "300000 100000\n"}, 3, id="v2, a cgroup namespace"),
        pytest.param(
            ["0::/docker/1"],
            [("/docker/1", "cg", V2)],
            {"cg/cpu.max": "300000 100000\n"},
            3,
            id="v2, a container that sees the host's path",
        ),
        pytest.param(
            ["0::/docker/1/step"],
            [("/docker/1", "cg", V2)],
            {"cg/step/cpu.max": "100000 100000\n", "cg/cpu.max": "300000 100000\n"},
            1,
            id="v2, a group in such a container",
        ),
        pytest.param(
            ["0::/../../b"],
            [("/../..", "cg", V2)],
            {"cg/cpu.max": "100000 100000\n"},
            1,
            id="v2, outside the namespace",
        ),
        pytest.param(["0::/a b"], [("/", "c g", V2)], {"c g/a b/cpu.max": "100000 100000\n"}, 1, id="v2, spaces"),
        pytest.param(["0::/a:b"], [("/", "cg", V2)], {"cg/a:b/cpu.max": "100000 100000\n"}, 1, id="v2, a colon"),
        pytest.param(["4:cpu,cpuacct:/a/b"], [("/", "cpu", V1)], v1("cpu/a/b", 250_000), 2.5, id="v1"),
        pytest.param(
            ["4:cpuacct,cpu:/a/b"], [("/", "cpu", V1)], v1("cpu/a", 50_000, 25_000), 2, id="v1, of an ancestor"
        ),
        pytest.param(["4:cpu,cpuacct:/a"], [("/", "cpu", V1)], v1("cpu/a", -1), None, id="v1 without a limit"),
        pytest.param(
            ["4:cpu,cpuacct:/docker/1"],
            [("/docker/1", "cpu", V1)],
            v1("cpu", 100_000),
            1,
            id="v1, a container that sees the host's path",
        ),
        pytest.param(
            ["5:cpuset:/a", "3:memory:/a", "2:cpu:/b", "0::/a"],
            [("/", "memory", V1_OF_MEMORY), ("/", "cpu", "cgroup cgroup rw,cpu"), ("/", "unified", V2)],
            v1("cpu/a", 100_000) | v1("memory/b", 100_000) | v1("cpu/b", 400_000),
            4,
            id="v1 beside v2: only the group of cpu counts",
        ),
        pytest.param(["0::/a"], [("/", "cg", V2)], {"cg/a/cpu.max": "many\n"}, None, id="v2, unreadable"),
        pytest.param(["0::/a"], [], {}, None, id="v2, not mounted"),
        pytest.param(
            ["3:memory:/a"], [("/", "memory", V1_OF_MEMORY)], v1("memory/a", 100_000), None, id="no group of cpu"
        ),
    ],
)
def test_the_quota_is_found(
    groups: list[str],
    mounts: list[tuple[str, str, str]],
    files: dict[str, str],
    quota: float | None,
    tmp_path: Path,
) -> None:
    assert cgroup_quota(process(tmp_path / "self", groups, mounts, files)) == quota


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("bound", "installed", "quota", "count", "text"),
    [
        (8, 8, "max 100000", 8, "8 cores"),
        (1, 1, "max 100000", 1, "1 core"),
        (4, 8, "max 100000", 4, "4 of 8 cores: CPU affinity"),
        (8, 8, "200000 100000", 2, "2 of 8 cores: cgroup quota of 2"),
        (8, 8, "290000 100000", 2, "2 of 8 cores: cgroup quota of 2.9"),
        (8, 8, "50000 100000", 1, "1 of 8 cores: cgroup quota of 0.5"),
        (4, 8, "200000 100000", 2, "2 of 8 cores: cgroup quota of 2"),
        (2, 8, "400000 100000", 2, "2 of 8 cores: CPU affinity"),
        (1, 8, "50000 100000", 1, "1 of 8 cores: CPU affinity"),
        (8, 8, "800000 100000", 8, "8 cores"),
    ],
)
def test_the_smaller_of_affinity_and_quota_counts(
    bound: int, installed: int, quota: str, count: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(bound)))
    monkeypatch.setattr(os, "cpu_count", lambda: installed)
    cores = usable_cores(process(tmp_path / "self", ["0::/a"], [("/", "cg", V2)], {"cg/a/cpu.max": quota}))
    assert (cores.count, str(cores)) == (count, text)
    assert Cores(cores.count, installed, cores.limit) == cores


@pytest.mark.parametrize(
    ("environment", "parent", "threads"),
    [
        ({}, {}, 8),
        ({"OMP_NUM_THREADS": "3"}, {}, 3),
        ({"OMP_NUM_THREADS": "99"}, {}, 8),
        ({"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}, {}, 8),  # torchrun's number, not a person's
        ({"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3"}, 3),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, {}, 8),
        ({}, {"OMP_NUM_THREADS": "3"}, 8),  # of a shell, say, which does not pass it on
    ],
)
def test_a_pool_has_as_many_threads_as_a_person_asks_for(
    environment: dict[str, str], parent: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("shardstep.configs.cores.parent_environment", lambda: parent)
    monkeypatch.setattr("shardstep.configs.cores.cgroup_quota", lambda process: None)
    assert pool_threads() == threads


@contextlib.contextmanager
def real_group(quota: float) -> Iterator[Path]:
    """A cgroup of this machine with a quota; the test is skipped where none can be made."""
    folder = None
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct")):
        with contextlib.suppress(OSError):
            folder = root / f"shardstep-test-{os.getpid()}"
            folder.mkdir()
            if (folder / "cpu.max").exists():
                (folder / "cpu.max").write_text(f"{round(quota * 100_000)} 100000")
                break
            if (folder / "cpu.cfs_quota_us").exists():
                (folder / "cpu.cfs_quota_us").write_text(str(round(quota * 100_000)))
                break
            folder.rmdir()
        folder = None
    if folder is None:
        pytest.skip("no cgroup with a quota can be made here: this takes root and the controller cpu")
    try:
        yield folder
    finally:
        for _ in range(100):  # the kernel forgets processes that have ended a moment later
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def test_a_real_group() -> None:
    code = "from shardstep.configs.cores import usable_cores; print(usable_cores())"
    with real_group(0.5) as folder:
        joins = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')"
        result = subprocess.run([sys.executable, "-c", f"{joins}\n{code}"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("1 of" if (os.cpu_count() or 1) > 1 else "1 core"), result.stdout
