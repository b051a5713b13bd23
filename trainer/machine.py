"""What this machine has: processor, memory, disks, network interfaces. Looks, and leaves nothing behind."""

import array
import os
import platform
import resource
import shutil
import socket
import struct
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "torchvision", "accelerate", "webdataset", "shardstep")
_SIOCGIFCONF = 0x8912  # <linux/sockios.h>
_IFREQ_BYTES, _MOST_INTERFACES = 40, 128


@dataclass(frozen=True)
class Cpu:
    """A processor: its name, the widest vectors it has (such as AVX-512), and its bf16 units, if any."""

    name: str
    vectors: str
    bf16_units: str


@dataclass(frozen=True)
class DiskSpace:
    """Free room on the file system of a folder that may not be there yet; `inodes` is None where they are unlimited."""

    folder: str
    bytes: int
    inodes: int | None


def versions() -> dict[str, str]:
    """Of Python and of the libraries that must be the same on all ranks."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def read_cpu() -> Cpu:
    """This machine's processor, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    return parse_cpu(path.read_text(errors="replace") if path.is_file() else "")


def parse_cpu(text: str) -> Cpu:
    """A processor from the text of /proc/cpuinfo."""
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
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def level_2_cache_bytes() -> int:
    """Of one core; 0 where the system does not tell."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (cache / "level").read_text().strip() == "2":
                return 1024 * int((cache / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):
            continue
    return 0


def resident_bytes() -> int:
    """What this process holds in memory now; on systems without /proc, the most it has held so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm; None where there is none."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def interfaces() -> list[str]:
    """Names of the network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine sends to an address; None where it cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of UDP: chooses a route, sends nothing
            own = probe.getsockname()[0]
            return _interface_of(probe, own)
    except (OSError, ImportError):
        return None


def is_loopback(address: str) -> bool:
    """Whether an address means the very machine that uses it, whichever that is."""
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False


def _interface_of(probe: socket.socket, own: str) -> str | None:
    import fcntl

    requests = array.array("B", bytes(_IFREQ_BYTES * _MOST_INTERFACES))
    place, length = requests.buffer_info()
    filled = struct.unpack("iL", fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, struct.pack("iL", length, place)))[0]
    for start in range(0, filled, _IFREQ_BYTES):
        entry = requests.tobytes()[start : start + _IFREQ_BYTES]
        if socket.inet_ntoa(entry[20:24]) == own:
            return entry[:16].partition(b"\0")[0].decode()
    return None


def disk_space(folder: Path) -> DiskSpace:
    """Free room for a folder, on the file system where it is or would be made."""
    place = nearest(folder)
    found = os.statvfs(place)
    inodes = found.f_favail if found.f_files else None  # btrfs and others count none
    return DiskSpace(str(folder), found.f_bavail * found.f_frsize, inodes)


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or the folder not be made; None if it can. Leaves no file."""
    place = nearest(folder)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # has no name where the file system can do that
            file.write(b"shardstep")
            file.flush()
    except OSError as error:
        return f"no file can be made in {place} ({error.strerror})"
    return None


def nearest(folder: Path) -> Path:
    """What a folder's path leads to, or the nearest place above it that exists."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
