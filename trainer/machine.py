"""What this machine has: processor, memory, disks, network interfaces. Read only; leaves nothing behind."""

import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

LIBRARIES = ("torch", "torchvision", "accelerate", "webdataset", "shardstep")


@dataclass(frozen=True)
class Cpu:
    """A processor: its name, its widest vector instructions (such as AVX-512), and its bf16 units, if any."""

    name: str
    vectors: str
    bf16_units: str


@dataclass(frozen=True)
class DiskSpace:
    """Free space on the file system of a folder, which need not exist yet; `inodes` is None if they are unlimited."""

    folder: str
    bytes: int
    inodes: int | None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that must be the same on all ranks."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def read_cpu() -> Cpu:
    """Read this machine's processor from /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    return parse_cpu(path.read_text(errors="replace") if path.is_file() else "")


def parse_cpu(text: str) -> Cpu:
    """Parse the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    vectors = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sve", "SVE"), ("asimd", "NEON"))
    units = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512"), ("svebf16", "SVE"), ("bf16", "NEON"))
    return Cpu(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        vectors=next((name for flag, name in vectors if flag in flags), ""),
        bf16_units=next((name for flag, name in units if flag in flags), ""),
    )


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return psutil.virtual_memory().total


def level_2_cache_bytes() -> int:
    """Return the size of one core's level 2 cache; 0 if unknown."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (cache / "level").read_text().strip() == "2":
                return 1024 * int((cache / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):
            continue
    return 0


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return psutil.Process().memory_info().rss


def shared_memory_bytes() -> int | None:
    """Return the size of /dev/shm; None if there is none."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def interfaces() -> list[str]:
    """Return the names of the network interfaces."""
    return [name for _, name in socket.if_nameindex()]  # psutil leaves out those without an address


def interface_towards(address: str) -> str | None:
    """Return the network interface through which this machine sends to an address; None if there is no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # UDP: chooses a route, sends nothing
            source = probe.getsockname()[0]
    except OSError:
        return None
    places = psutil.net_if_addrs().items()
    return next((name for name, bound in places if source in [entry.address for entry in bound]), None)


def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address, which means a different machine on each host."""
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False


def disk_space(folder: Path) -> DiskSpace:
    """Return the free space for a folder, on the file system where it is or would be created."""
    place = nearest(folder)
    found = os.statvfs(place)
    inodes = found.f_favail if found.f_files else None  # btrfs, for one, counts none
    return DiskSpace(str(folder), found.f_bavail * found.f_frsize, inodes)


def write_problem(folder: Path) -> str | None:
    """Return why a folder cannot be created or written to; None if it can. Leaves no file behind."""
    place = nearest(folder)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # unnamed, where the file system supports that
            file.write(b"shardstep")
            file.flush()
    except OSError as error:
        return f"no file can be created in {place} ({error.strerror})"
    return None


def nearest(folder: Path) -> Path:
    """Return the folder itself if it exists, else its nearest parent that does."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
