"""Compile C code of shardstep for this machine's processor at its first use, load it, and lend it memory."""

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
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # noqa: F401  loaded first, so that our libraries share its OpenMP threads, if it brings a libgomp.so.1

from shardstep.configs.files import sync_to_disk
from shardstep.datasets.cache import cache_folder

_OPTIONS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
_OTHERS_MAY_WRITE = 0o022
DONE, NEEDS_MEMORY = 0, 3
"""What C code returns that takes memory of a thread, see crop.h."""


class NoCompilerError(Exception):
    """C code cannot be compiled here, or the library cannot be kept; the message says why, in a line."""


def load(source: Path, libraries: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Load the library of a C file; compile it first with $CC or cc, into a folder of the cache that only we can write to.

    A library is reused only for the same source, headers beside it, command and processor, because different nodes may
    share the folder. `libraries` are those that it is linked with, such as "jpeg".

    Raises:
        NoCompilerError: there is no compiler, it refuses the file, or the library cannot be kept or loaded.
    """
    try:
        command = [*shlex.split(os.environ.get("CC") or "cc"), *_OPTIONS]
        links = [f"-l{name}" for name in libraries]
        code = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
        text = "\n".join([*code, *command, *links, platform.machine(), _abilities()])
        library = _own_folder() / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        with contextlib.suppress(OSError):  # not compiled yet
            return ctypes.CDLL(str(library))
        _compile(command, source, links, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, ValueError) as error:  # no home, an unclosed quote in CC
        raise NoCompilerError(str(error)) from None


@functools.cache
def missing(source: Path, libraries: tuple[str, ...] = ()) -> str | None:
    """Return what this machine lacks for a C file, in a few words, or None. The result is cached."""
    try:
        load(source, libraries)
    except NoCompilerError as error:
        return f"a C compiler ({error})"
    return None


class Scratch(ctypes.Structure):
    """`struct scratch` of crop.h: memory that C code may use during a call; kept alive by this object."""

    _fields_ = [("memory", ctypes.c_void_p), ("size", ctypes.c_size_t), ("used", ctypes.c_size_t)]

    def __init__(self, size: int):
        self._memory = np.empty(size, dtype=np.uint8)
        super().__init__(self._memory.ctypes.data, size, 0)


def call_with_scratch(call: Callable[[Scratch], int]) -> int:
    """Call C code with the memory of this thread, and once more if it needs more memory; return its result."""
    result = call(_thread.scratch)
    if result == NEEDS_MEMORY:
        _thread.scratch = Scratch(_thread.scratch.used)
        result = call(_thread.scratch)
    return result


class _Thread(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.scratch = Scratch(0)


_thread = _Thread()


def _own_folder() -> Path:
    """Return our folder in the cache folder, which others may share: the libraries here are executed."""
    folder = cache_folder() / f"native-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & _OTHERS_MAY_WRITE:
        raise NoCompilerError(f"{folder} belongs to others, or others may write there")
    return folder


def _abilities() -> str:
    """Return the processor's flags on x86, its features on ARM; empty if the system does not list them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], source: Path, links: list[str], library: Path) -> None:
    """Compile into a private file and rename it: several ranks may do so at once."""
    if not shutil.which(command[0]):
        raise NoCompilerError(f"there is no {command[0]}")
    descriptor, own = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(descriptor)
    try:
        compiler = subprocess.run(
            [*command, "-o", own, str(source), *links], capture_output=True, text=True, errors="replace", check=False,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
        if compiler.returncode:
            raise NoCompilerError(f"{command[0]}: {_first_complaint(compiler.stderr)}")
        sync_to_disk(Path(own))  # after a power failure, loading a truncated library would crash the process
        os.replace(own, library)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(own)


def _first_complaint(text: str) -> str:
    """Return the first line that reports an error; a linker gives the reason before its last line."""
    lines = text.splitlines() or ["it failed without a message"]
    wanted = [line for line in lines if "error:" in line or "cannot find" in line or "fatal" in line]
    return (wanted or lines)[0]
