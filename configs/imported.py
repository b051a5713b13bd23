"""Functions by import path: `path/to/file.py:function` or `package.module:function`, wherever a recipe has a name.

`find_function` turns what a recipe says into a place: `FOLDER/file.py:function` or `FOLDER/package.module:function`, with an
absolute folder; the name of an installed package is a place as it is. `load_function` imports a place. A file may import its
neighbours: its folder comes first on sys.path meanwhile, and not afterwards. Modules of one name from two folders are two.

`own_traceback` explains an error by the frames of imported code alone. Nothing here imports torch.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeGuard

from shardstep.configs.components import neighbours
from shardstep.configs.errors import InputError

FORMS = "path/to/file.py:function or package.module:function"
_OURS = Path(__file__).resolve().parent.parent
_LAYERS = tuple(f"{_OURS / name}{os.sep}" for name in ("configs", "datasets", "trainer", "launch"))
_INSTALLED = ("site-packages", "dist-packages")
_LONGEST_VALUE = 60  # characters of an argument in a message


@dataclass
class OwnFolder:
    """A folder that code was imported from.

    Attributes:
        modules: those imported from it, by name.
        files: their content when they were imported, by path relative to the folder.
    """

    path: Path
    modules: dict[str, ModuleType] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def is_own(self, file: str | None) -> bool:
        """Return whether a file is code of this folder, and neither an installed package in it nor shardstep."""
        if not file or not file.startswith(os.path.join(self.path, "")) or file.startswith(_LAYERS):
            return False
        return not any(part in _INSTALLED for part in Path(file).relative_to(self.path).parts)


_folders: dict[Path, OwnFolder] = {}
_functions: dict[str, Callable[..., Any]] = {}
_packages: set[str] = set()  # folders of installed packages that recipes have named; their code is not only for recipes


def is_import_path(name: Any) -> TypeGuard[str]:
    """Return whether a name of a recipe is an import path: it has a colon."""
    return isinstance(name, str) and ":" in name


def is_imported_source(source: str | None) -> TypeGuard[str]:
    """Return whether data.source is an import path, and neither a path that exists nor `synthetic:N`."""
    if not is_import_path(source) or source.startswith("synthetic:") or "://" in source:
        return False
    return not os.path.exists(os.path.expanduser(source))


def is_place(name: Any) -> bool:
    """Return whether an import path says where its code is, rather than what to look for."""
    head = str(name).rpartition(":")[0]
    return is_import_path(name) and (head.startswith("/") or not ("/" in head or head.endswith(".py")))


def folder_of(place: str) -> Path | None:
    """Return the folder that a place is imported from; None for an installed package."""
    folder = place.rpartition(":")[0].rpartition("/")[0]
    return Path(folder or "/") if place.startswith("/") else None


def find_function(name: str, folders: Sequence[Path]) -> str:
    """Return the place of an import path, which is looked for in these folders, then among what is installed.

    Imports nothing.

    Raises:
        InputError: it has another form, or is nowhere; the message lists where it was looked for.
    """
    head, _, function = name.rpartition(":")
    prefix, _, module = head.rpartition("/")
    is_file = head.endswith(".py")
    if not function.isidentifier() or not (is_file or all(part.isidentifier() for part in module.split("."))):
        raise InputError(f"{name} is not of the form {FORMS}")
    starts = [Path(os.path.abspath(folder / Path(prefix).expanduser())) for folder in folders]
    starts = list(dict.fromkeys(starts))
    inside = Path(module) if is_file else Path(*module.split("."))
    for start in starts:
        forms = [inside] if is_file else [inside.with_suffix(".py"), inside / "__init__.py"]
        if any((start / form).is_file() for form in forms):
            return f"{start / module}:{function}"
    looked = ", ".join(map(str, starts))
    if is_file:
        raise InputError(f"there is no file {module} in {looked}")
    if prefix or not (spec := _installed(module.partition(".")[0])):
        installed = "" if prefix else ", and among the installed packages"
        raise InputError(f"there is no module {module}: looked in {looked}{installed}")
    origin = Path(spec.origin or "")
    source = origin.parent.parent if spec.submodule_search_locations else origin.parent
    if _is_editable(origin) and ((source / inside).with_suffix(".py").is_file() or (source / inside).is_dir()):
        return f"{source / module}:{function}"  # its version would not say which code it is
    return name


def load_function(place: str) -> Callable[..., Any]:
    """Import a place, once in this process.

    Raises:
        InputError: there is no such module, or no such function in it.
        Exception: whatever importing its code raises; see own_traceback.
    """
    if place not in _functions:
        head, _, name = place.rpartition(":")
        folder = folder_of(place)
        module = _import_installed(head) if folder is None else _import_from(folder, head)
        function = getattr(module, name, None)
        if not callable(function):
            named = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
            what = "no function" if function is None else "something that is no function in"
            raise InputError(f"{head} has {what} {name}; {neighbours(name, named)}")
        _functions[place] = function
    return _functions[place]


def with_imported(known: Mapping[str, Callable], name: Any) -> Mapping[str, Callable]:
    """Return the functions to look a name up in: the known ones, or the one that an import path names."""
    return {name: load_function(name)} if is_import_path(name) else known


def build(what: str, place: str, *arguments: Any, **options: Any) -> Any:
    """Call an imported function that builds something; imports in its body find the neighbours of its file, too."""
    folder = folder_of(place)
    with importable(folder) if folder else contextlib.nullcontext():
        return call(what, load_function(place), *arguments, **options)


def call(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function. If it raises, own_traceback finds in this frame what was called with which arguments."""
    return function(*arguments, **options)


@contextlib.contextmanager
def importable(path: Path) -> Iterator[OwnFolder]:
    """Let a block import modules of a folder, and keep what it has imported from there in `folder.files`."""
    folder = _folders.setdefault(path, OwnFolder(path))
    for other in _folders.values():
        for name, module in other.modules.items():
            if other is not folder and sys.modules.get(name) is module:
                del sys.modules[name]
    hidden = {name: sys.modules[name] for name in folder.modules if name in sys.modules}
    sys.modules.update(folder.modules)
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing appears beside the user's files
    try:
        yield folder
    finally:
        sys.dont_write_bytecode = writes_bytecode
        with contextlib.suppress(ValueError):  # the code has removed it
            sys.path.remove(str(path))
        _keep_imported(folder, hidden)


def own_files(path: Path) -> dict[str, bytes]:
    """Return the files that were imported from a folder in this process, by path relative to it, as they were then."""
    return dict(_folders[path].files) if path in _folders else {}


def own_traceback(error: BaseException) -> str | None:
    """Explain an error that imported code raised: what was called with which arguments, and its own frames.

    Returns None for an error of other code.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    calls = [place for place, (frame, _) in enumerate(frames) if frame.f_code is call.__code__]
    files = [frame.f_code.co_filename for frame, _ in frames]
    own = [place for place, file in enumerate(files) if any(folder.is_own(file) for folder in _folders.values())]
    if calls and not own:
        own = [place for place, file in enumerate(files) if place > calls[-1] and file.startswith(tuple(_packages))]
    if not own and not calls:
        return None
    callers = [place for place in range(own[0]) if _is_call(frames[place][0])] if own else calls
    called = _describe(frames[callers[-1] if callers else own[0]][0])
    stack = traceback.StackSummary.extract(frames[place] for place in own)
    lines = [f"{called} raised {type(error).__name__}", *(["Traceback (most recent call last):"] if own else [])]
    return "\n".join(lines) + "\n" + "".join([*stack.format(), *traceback.format_exception_only(error)]).rstrip("\n")


def _installed(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was made without a spec
        return None


def _is_editable(origin: Path) -> bool:
    """Return whether the file of an installed package lies in its author's folder."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    return origin.is_absolute() and not (origin.is_relative_to(stdlib) or set(_INSTALLED) & set(origin.parts))


def _import_installed(module: str) -> ModuleType:
    spec = _installed(module.partition(".")[0])
    _packages.update(f"{folder}{os.sep}" for folder in (spec and spec.submodule_search_locations) or ())
    try:
        return call(f"importing {module}", importlib.import_module, module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"there is no module {error.name} among the installed packages") from None
        raise


def _import_from(path: Path, head: str) -> ModuleType:
    with importable(path) as folder:
        file = Path(head)
        if file.suffix == ".py":
            loaded = [module for module in folder.modules.values() if module.__file__ == str(file)]
            return loaded[0] if loaded else call(f"importing {file}", _import_file, file)
        module = call(f"importing {head}", importlib.import_module, file.name)
        if not folder.is_own(getattr(module, "__file__", None)):
            raise InputError(
                f"{head}: a module {file.name} of {getattr(module, '__file__', 'Python')} is loaded already: rename yours"
            )
        return module


def _import_file(file: Path) -> ModuleType:
    """Import a file under a name that no library looks for, as some do for `datasets` or `wandb`."""
    name = f"{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_elsewhere(name: str, path: Path) -> bool:
    """Return whether a module of this name can be imported from anywhere but a folder."""
    before, loaded = sys.path[:], sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in before if os.path.abspath(entry) != str(path)]
    try:
        spec = _installed(name)
        return spec is not None and spec.origin is not None
    finally:
        sys.path[:] = before
        if loaded is not None:
            sys.modules[name] = loaded


def _keep_imported(folder: OwnFolder, hidden: Mapping[str, ModuleType]) -> None:
    """Record the folder's modules and files; take away those whose names a library may look for."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name not in ("__main__", *folder.modules) and folder.is_own(file):
            folder.modules[name] = module
            folder.files[str(Path(file).relative_to(folder.path))] = Path(file).read_bytes()
    for top in {name.partition(".")[0] for name in folder.modules}:
        if _is_elsewhere(top, folder.path):
            for name in [name for name in folder.modules if name.partition(".")[0] == top]:
                sys.modules.pop(name, None)
    sys.modules.update((name, module) for name, module in hidden.items() if folder.modules[name] is not module)


def _is_call(frame: FrameType) -> bool:
    """Return whether a frame still has the arguments of a call: ours, or torch's of a module."""
    return frame.f_code is call.__code__ or frame.f_code.co_name == "_wrapped_call_impl"


def _describe(frame: FrameType) -> str:
    """Return what a frame calls, or is, with the shapes of its arguments."""
    found = frame.f_locals
    if frame.f_code is call.__code__:
        name, values = found["what"], list(found["arguments"])
        if name.startswith("importing "):
            return name
        given = [*map(_text, values), *(f"{key}={_text(value)}" for key, value in found["options"].items())]
    elif frame.f_code.co_name == "_wrapped_call_impl":
        name, given = type(found["self"]).__name__, list(map(_text, found["args"]))
    else:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        name, given = frame.f_code.co_name, [f"{key}={_text(found[key])}" for key in names if key in found]
    return f"{name}({', '.join(given)})"


def _text(value: Any) -> str:
    """Return a value as a message has it: of a tensor or an array its type and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple) and any(hasattr(one, "shape") or isinstance(one, dict) for one in value):
        return f"{type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str | list | tuple):
        text = repr(value)
        return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
    return type(value).__name__
