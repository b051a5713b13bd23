"""The code that a recipe names by import path: where it is, what it holds, and the names that a run's folder has for it.

A run's folder keeps the files in `code/`, so that its config.yaml, which lies beside, finds them by names of its own:
`code/net.py:net` for `/home/me/net.py:net`. Files of a second folder are in `code/2/`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.imported import (
    find_function,
    folder_of,
    is_import_path,
    is_imported_source,
    is_place,
    load_function,
    own_files,
)
from shardstep.configs.schema import OPEN_SECTIONS, Recipe

CODE = "code"
"""The folder in a run's folder that has copies of the files."""


@dataclass(frozen=True)
class Code:
    """What identifies the code that a recipe names.

    Attributes:
        names: of the functions, as a run's config.yaml has them, sorted.
        files: sha256 of each imported file, by its path in a run's code folder.
        packages: version of each installed package.
    """

    names: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A sha256 of the names and the files; the same on any machine, whatever its versions of packages. Empty for none."""
        if not self.names:
            return ""
        return hashlib.sha256(json.dumps([self.names, sorted(self.files.items())]).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return it as a run's folder keeps it."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def with_places(recipe: Recipe, folders: Sequence[Path]) -> tuple[Recipe, dict[str, str]]:
    """Replace each import path of a recipe by its place, see find_function, and import it; return the problems by key, too.

    A source is imported when shards are written from it.
    """
    problems: dict[str, str] = {}

    def found(where: str, name: str) -> str:
        try:
            place = find_function(name, folders)
            if where != "data.source":
                load_function(place)
            return place
        except InputError as error:
            problems[where] = f"{where}={name}: {error}"
            return name

    source = recipe.data.source
    if is_imported_source(source):
        recipe = replace(recipe, data=replace(recipe.data, source=found("data.source", source)))
    return _map_names(recipe, found), problems


def as_kept(recipe: Recipe) -> Recipe:
    """Return a recipe as a run's folder keeps it: with the names of the copies in its code folder."""
    prefixes = {folder: f"{CODE}/{prefix}" for folder, prefix in _prefixes(recipe).items()}

    def kept(where: str, place: str) -> str:
        folder = folder_of(place) if is_place(place) else None
        return place if folder is None else prefixes[folder] + place.rpartition("/")[2]

    return _map_names(recipe, kept)


def code_of(recipe: Recipe) -> Code:
    """Return the code that a recipe with places has imported so far."""
    places = names_of_code(recipe)
    if not places:
        return Code()
    files = {path: hashlib.sha256(content).hexdigest() for path, content in imported_files(recipe).items()}
    tops = {place.partition(":")[0].partition(".")[0] for place in places if folder_of(place) is None}
    packages = {name: version for top in tops for name, version in _versions(top).items()}
    return Code(sorted(names_of_code(as_kept(recipe))), dict(sorted(files.items())), packages)


def imported_files(recipe: Recipe) -> dict[str, bytes]:
    """Return the imported files of a recipe with places, by path in a run's code folder, as they were when imported."""
    return {
        prefix + path: content
        for folder, prefix in _prefixes(recipe).items()
        for path, content in own_files(folder).items()
    }


def origin_of(recipe: Recipe, path: str) -> Path | None:
    """Return the file that a path in a run's code folder stands for in a recipe with places; None if in none of them."""
    fitting = [(prefix, folder) for folder, prefix in _prefixes(recipe).items() if path.startswith(prefix)]
    prefix, folder = max(fitting, default=("", None), key=lambda pair: len(pair[0]))
    return folder / path.removeprefix(prefix) if folder else None


def names_of_code(recipe: Recipe) -> list[str]:
    """Return the import paths of a recipe, in the order of its sections, each once."""
    names: dict[str, None] = {}

    def note(where: str, name: str) -> str:
        names[name] = None
        return name

    _map_names(recipe, note)
    return list(names)


def _prefixes(recipe: Recipe) -> dict[Path, str]:
    """Return where a run's code folder has the files of each folder that a recipe with places names."""
    folders = [folder_of(place) for place in names_of_code(recipe) if is_place(place)]
    known = list(dict.fromkeys(folder for folder in folders if folder is not None))
    return {folder: "" if number == 1 else f"{number}/" for number, folder in enumerate(known, start=1)}


def _versions(top: str) -> dict[str, str]:
    names = metadata.packages_distributions().get(top, [])
    return {name: metadata.version(name) for name in sorted(set(names))}


def _map_names(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """Return a recipe with every import path of a section, a group or an augmentation replaced by `change(where, name)`."""

    def entry(where: str, given: Any) -> Any:
        if is_import_path(given):
            return change(where, given)
        if isinstance(given, dict) and is_import_path(given.get("name")):
            return given | {"name": change(f"{where}.name", given["name"])}
        return given

    def entries(where: str, given: Any) -> Any:
        return (
            [entry(f"{where}[{place}]", one) for place, one in enumerate(given)] if isinstance(given, list) else given
        )

    sections = {name: entry(name, getattr(recipe, name)) for name in OPEN_SECTIONS}
    if "groups" in sections["optimizer"]:
        groups = entries("optimizer.groups", sections["optimizer"]["groups"])
        sections["optimizer"] = sections["optimizer"] | {"groups": groups}
    augment = entries("data.augment", recipe.data.augment)
    return replace(recipe, data=replace(recipe.data, augment=augment), **sections)
