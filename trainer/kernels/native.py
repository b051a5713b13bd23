"""C code of this package, compiled for the processor at hand when it is first used."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  what is loaded here then shares the OpenMP threads of torch, where it brings a libgomp.so.1

from shardstep.configs.files import sync_to_disk
from shardstep.datasets.cache import cache_folder

_OPTIONS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
_OTHERS_MAY_WRITE = 0o022


class NoCompilerError(Exception):
    """C code cannot be compiled here, or what it was compiled to not be kept; in a line, why."""


def load(source: Path) -> ctypes.CDLL:
    """The library made of a C file, compiled by $CC, else by cc, and kept in the cache folder, where others cannot write.

    A kept one is taken only for the same source, command and processor: nodes of several kinds may share the folder.

    Raises:
        NoCompilerError: there is no compiler, it refuses the file, or what it makes cannot be kept or loaded.
    """
    try:
        command = [*shlex.split(os.environ.get("CC") or "cc"), *_OPTIONS]
        library = _own_folder() / f"{source.stem}-{_digest(source, command)}.so"
        with contextlib.suppress(OSError):  # it is not there yet
            return ctypes.CDLL(str(library))
        _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, ValueError) as error:  # no home, an unclosed quote in CC
        raise NoCompilerError(str(error)) from None


@functools.cache
def missing(source: Path) -> str | None:
    """What this machine lacks for a C file, in a few words; what was found is kept."""
    try:
        load(source)
    except NoCompilerError as error:
        return f"a C compiler ({error})"
    return None


def _own_folder() -> Path:
    """In the cache folder, which others may share: what lies here is run."""
    folder = cache_folder() / f"native-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & _OTHERS_MAY_WRITE:
        raise NoCompilerError(f"{folder} belongs to others, or others may write there")
    return folder


def _digest(source: Path, command: list[str]) -> str:
    text = "\n".join([source.read_text(), *command, platform.machine(), _abilities()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _abilities() -> str:
    """Of the processor: its flags on x86, its features on ARM; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Into a file of this process's own, which then takes its place as a whole: several ranks may do so at once."""
    if not shutil.which(command[0]):
        raise NoCompilerError(f"there is no {command[0]}")
    descriptor, own = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(descriptor)
    try:
        compiler = subprocess.run(
            [*command, "-o", own, str(source)], capture_output=True, text=True, errors="replace", check=False,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
        if compiler.returncode:
            raise NoCompilerError(f"{command[0]}: {_first_complaint(compiler.stderr)}")
        sync_to_disk(Path(own))  # a library that a crash has cut off would be loaded, and end the process
        os.replace(own, library)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(own)


def _first_complaint(text: str) -> str:
    """The first line that names an error; a linker's reason stands before its last one."""
    lines = text.splitlines() or ["it failed, and did not say why"]
    wanted = [line for line in lines if "error:" in line or "cannot find" in line or "fatal" in line]
    return (wanted or lines)[0]
