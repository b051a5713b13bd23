"""Names in a table to the files that they mean: a name may lack folders or the extension, or have more folders."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from shardstep.datasets.input_files import IMAGE_EXTENSIONS, split_name


def files_of_names(names: Sequence[str], root: str, files: Sequence[str], folder: str = "") -> list[list[int]]:
    """Return for each name the numbers of the files that it means: one, or none, or several if it fits them equally well.

    A name means a file if the path of the file ends with it: 7, 7.jpg, birds/7.jpg and photos/birds/7 all mean
    photos/birds/7.jpg. Only if no name does so, the other way round: /their/disk/birds/7.jpg ends with the path birds/7.jpg.
    Neither upper and lower case nor Unicode forms count, except between files that differ in nothing else.

    Args:
        root: the path that `files` are below.
        folder: one below `root` whose files are preferred.
    """
    forms = [_form(name) for name in names]
    paths = [_form(f"{root}/{file}") for file in files]
    found = _ends_of_paths(forms, paths)
    if not any(found):
        found = _paths_at_ends(forms, [_form(file) for file in files])
    return [
        _nearest(name, some, files, folder) if len(some) > 1 else some for name, some in zip(names, found, strict=True)
    ]


def _ends_of_paths(names: list[str], paths: list[str]) -> list[list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for parts in {_parts(name) for name in names}:
        for number, path in enumerate(paths):
            if _parts(path) >= parts:
                numbers[_end(split_name(path)[0], parts)].append(number)
    found = []
    for name in names:
        key, extension = _key(name)
        found.append([n for n in numbers.get(key, ()) if not extension or split_name(paths[n])[1] == extension])
    return found


def _paths_at_ends(names: list[str], files: list[str]) -> list[list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, file in enumerate(files):
        numbers[file].append(number)
        numbers[split_name(file)[0]].append(number)
    depths = sorted({_parts(file) for file in files}, reverse=True)
    ends = ([_end(name, parts) for parts in depths if _parts(name) > parts] for name in names)
    return [next((numbers[end] for end in some if end in numbers), []) for some in ends]


def _nearest(name: str, numbers: list[int], files: Sequence[str], folder: str) -> list[int]:
    """Keep the best of several files: in the folder, in the same upper and lower case, without further folders."""
    for is_better in (
        lambda file: file.startswith(f"{folder}/"),
        lambda file: file.endswith(name) or split_name(file)[0].endswith(name),
        lambda file: name in (file, split_name(file)[0]),
    ):
        numbers = [number for number in numbers if is_better(files[number])] or numbers
    return numbers


def _form(path: str) -> str:
    """Return a path without what may differ between machines: Unicode form, case, backslashes, and a leading "./"."""
    parts = unicodedata.normalize("NFC", path).casefold().replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _key(name: str) -> tuple[str, str]:
    """Split a name at the extension of an image; without one, its last dot belongs to the name."""
    key, extension = split_name(name)
    return (key, extension) if extension in IMAGE_EXTENSIONS else (name, "")


def _parts(path: str) -> int:
    return path.count("/") + 1


def _end(path: str, parts: int) -> str:
    return "/".join(path.rsplit("/", parts)[-parts:])
