"""C code of this package, compiled for the processor at hand when it is first used."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  what is loaded here shares the OpenMP threads that torch has brought

from shardstep.datasets.cache import cache_folder

_OPTIONS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


class NoCompilerError(Exception):
    """C code cannot be compiled here; in a few words, why."""


def load(source: Path) -> ctypes.CDLL:
    """The library made of a C file, compiled by $CC, else by cc, and kept in the cache folder.

    A kept one is taken only for the same source, command and processor: nodes of several kinds may share the folder.

    Raises:
        NoCompilerError: there is no compiler, it refuses the file, or what it made cannot be loaded.
    """
    command = [*shlex.split(os.environ.get("CC", "cc")), *_OPTIONS]
    made_for = "\n".join([source.read_text(), *command, platform.machine(), _processor()])
    library = cache_folder() / "native" / f"{source.stem}-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):  # not there yet, or cut off by a crash
        return ctypes.CDLL(str(library))
    try:
        _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompilerError(str(error)) from None


def _compile(command: list[str], source: Path, library: Path) -> None:
    """In a file of this process's own, which then takes its place as a whole: several ranks may do so at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(descriptor)
    try:
        done = subprocess.run([*command, "-o", made, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = (
                [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["failed"]
            )
            raise NoCompilerError(f"{command[0]}: {said[0]}")
        os.replace(made, library)
    except FileNotFoundError:
        raise NoCompilerError(f"there is no {command[0]}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)


def _processor() -> str:
    """What it can do: its flags on x86, its features on ARM; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
