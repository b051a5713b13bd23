"""Images inside parquet or Arrow files, as Hugging Face's datasets writes them: a column of files, and one of labels.

A column of images is a struct of bytes and path, or plain bytes. The names of classes are in the schema's metadata.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, listed
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.class_names import class_name, label_names, sorted_classes
from shardstep.datasets.input_files import FolderTree, LeftOut, is_hidden, is_image, joined, split_name
from shardstep.datasets.label_sets import NamedLabel, NamedShares, hold_several, names_in, several_names
from shardstep.datasets.progress import progress_bar
from shardstep.datasets.sources.class_folders import split_in_name
from shardstep.datasets.sources.parquet import COLUMN_FILES, open_columns
from shardstep.datasets.sources.source import Source, numbered_labels
from shardstep.datasets.sources.tables import LabelOptions, choose_label_column, columns_named

COLUMN_IMAGES = {kind: f"images in {kind} files" for kind in COLUMN_FILES}  # descriptions of such a Source
_CACHED = "cache-"  # begins the names of what Hugging Face's map and filter leave beside a saved data set
_READ_TOGETHER = 64  # images
_MOST_LEVELS = 3  # of folders, as in default/train/0000.parquet
_UNLABELLED = -1  # the label that Hugging Face gives to what has none


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    classes: list[str] | None  # if the file names them; its labels are then numbers


def find_column_files(folder: Path) -> list[str]:
    """Return the parquet or Arrow files in and below a folder, sorted; none where there are images beside them, or above.

    Raises:
        InputError: there are both.
    """
    tree, found, level = FolderTree(folder), list[str](), [""]
    for _ in range(1 + _MOST_LEVELS):
        folders = []
        for place in level:
            entries = [entry for entry in tree.entries(place) if not is_hidden(entry.name)]
            if any(is_image(entry.name) for entry in entries):
                return []
            files = [entry.name for entry in entries if entry.kind == "file"]
            found += [joined(place, name) for name in files if _has_columns(name)]
            folders += [joined(place, entry.name) for entry in entries if entry.kind == "folder"]
        level = folders
    if len({split_name(name)[1] for name in found}) > 1:
        raise InputError(f"{folder} has parquet and Arrow files: give the folder of one kind, or a file, as the source")
    return sorted(found)


def _has_columns(name: str) -> bool:
    kind = split_name(name)[1]
    return kind in COLUMN_FILES and not (kind == "arrow" and name.startswith(_CACHED))


def open_column_images(where: Path, names: Sequence[str], split: str | None, options: LabelOptions) -> Source:
    """Make a Source of the files of a split; their names or folders say which: train-00000-of-00002.parquet, ...

    Args:
        where: the folder of the files.
        names: of the parquet or Arrow files below it. If no name says a split, each split has all files.
        split: "train" or "test"; None takes all files.

    Raises:
        InputError: pyarrow is missing, a file cannot be read, none is of the split, or there are no plain columns of images
            and labels.
    """
    kind = split_name(names[0])[1]
    split_of_file = {name: split_in_name(name) for name in names}
    has_splits = split is not None and any(split_of_file.values())
    chosen = [name for name, its_split in split_of_file.items() if not has_splits or its_split == split]
    if not chosen:
        others = sorted({other for other in split_of_file.values() if other})
        raise InputError(
            f"{where} has no {kind} files of {split}, only of {', '.join(others)}: give the files' folder, or one file, as "
            f"the source"
        )
    columns = _columns(where / chosen[0], options)
    values = {name: _column(where / name, columns.label) for name in names}
    # Classes of all splits, so that each of them has the same.
    are_several = options.separator is not None or any(hold_several(some) for some in values.values())
    labels: dict[str, Sequence[NamedLabel]] = {}
    for name, some in values.items():
        place = f"{where / name}, column {columns.label}"
        labels[name] = (
            _several_names(some, columns.classes, place, options.separator)
            if are_several
            else _label_names(some, columns.classes, place)
        )
    classes = columns.classes or sorted_classes(
        name for some in labels.values() for label in some for name in names_in(label)
    )

    left_out, rows, kept = LeftOut(), list[NamedLabel](), list[int]()
    for name in chosen:
        for row, label in enumerate(labels[name], 1):
            if label != "":
                kept.append(len(rows))
            else:
                left_out.add("empty label", f"{name}: row {row}")
            rows.append(label)
    if not kept:
        raise InputError(f"{where}: no row of {listed(chosen)} has a label in the column {columns.label}")
    files = _Files(where, chosen, columns.image, len(rows))
    return Source(
        COLUMN_IMAGES[kind],
        classes,
        numbered_labels([rows[row] for row in kept], classes),
        lambda number: files.read(kept[number]),
        lambda number: files.names[kept[number]],
        has_splits,
        notes=[line] if (line := left_out.line(where, f"rows with {columns.image} and {columns.label}")) else [],
    )


class _Files:
    """The files in a column of images, copied one after the other into a file without a name: rows are read in any order."""

    def __init__(self, where: Path, names: Sequence[str], column: str, rows: int) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.names: list[str] = []
        self._places: list[tuple[int, int]] = []  # offset and size; a size of -1 for none
        with tempfile.TemporaryFile(dir=folder) as copy, progress_bar(f"reading {where}", rows, "rows") as advance:
            self._descriptor = os.dup(copy.fileno())
            offset = 0
            try:
                for name, value in _images(where, names, column):
                    content = value.get("bytes") if isinstance(value, dict) else value
                    path = value.get("path") if isinstance(value, dict) else None
                    self.names.append(f"{name}: {path or f'row {len(self.names) + 1}'}")
                    self._places.append((offset, -1 if content is None else len(content)))
                    offset += copy.write(content or b"")
                    advance(1)
                copy.flush()
            except OSError as error:  # a full disk; the file has no name
                error.filename = error.filename or str(folder)
                raise

    def read(self, row: int) -> bytes:
        offset, size = self._places[row]
        if size < 0:
            raise ValueError("cannot be read: the file holds no bytes for it")
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _images(where: Path, names: Sequence[str], column: str) -> Iterator[tuple[str, Any]]:
    for name in names:
        with (where / name).open("rb") as opened, open_columns(where / name, opened) as file:
            for batch in file.iter_batches(_READ_TOGETHER, columns=[column]):
                for value in batch.column(0):
                    yield name, value.as_py()


def _columns(path: Path, options: LabelOptions) -> _Columns:
    """Choose the columns of a file by the options, by what its metadata says, by their types, and by their names."""
    with path.open("rb") as opened, open_columns(path, opened) as file:
        schema = file.schema_arrow
    types = {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: _in_list(one) for name, one in features.items()}
        class_names = {name: one["names"] for name, one in kinds.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        class_names = {}
    structs = [name for name, kind in types.items() if kind.startswith("struct<") and "bytes: " in kind]
    images = structs or [name for name, kind in types.items() if kind in ("binary", "large_binary")]
    if options.image_column is not None:
        images = columns_named(types, options.image_column, "image", path)
    if len(images) != 1:
        raise InputError(
            f"{path}: which column has the images? Choose with --image-column (data.image_column in a recipe) among "
            f"{listed(images or list(types), most=30)}"
        )
    given = options.label_column or (next(iter(class_names)) if len(class_names) == 1 else None)
    label = choose_label_column(list(types), given, images, path)
    names = class_names.get(label)
    if names is not None:
        names = [class_name(str(name), f"write {path} again with names in UTF-8") for name in names]
    return _Columns(images[0], label, names)


def _in_list(feature: Any) -> dict[str, Any]:
    """Return a feature, or what it is a list of: earlier versions write [feature], later ones {"_type": "List", ...}."""
    while isinstance(feature, list) or "feature" in feature:
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature


def _column(path: Path, column: str) -> list[Any]:
    with path.open("rb") as opened, open_columns(path, opened) as file:
        columns_named(file.schema_arrow.names, column, "label", path)
        return list(file.read(columns=[column]).column(0).to_pylist())


def _label_names(values: list[Any], classes: list[str] | None, where: str) -> list[str]:
    """Return one name for each row; `classes` are those that the file names, whose numbers the values are then."""
    if classes is None:
        return label_names(values, where)
    names = label_names(["" if value == _UNLABELLED else value for value in values], where)
    return [name and _class_of_number(name, classes, where) for name in names]


def _several_names(
    values: list[Any], classes: list[str] | None, where: str, separator: str | None
) -> list[NamedShares]:
    """Return several names for each row; `classes` as in _label_names."""
    labels = several_names(values, where, separator)
    if classes is None:
        return labels
    return [tuple((_class_of_number(name, classes, where), share) for name, share in label) for label in labels]


def _class_of_number(number: str, classes: list[str], where: str) -> str:
    if 0 <= int(number) < len(classes):
        return classes[int(number)]
    raise InputError(f"{where}: label {number} is out of range: it names {count(len(classes), 'class', 'classes')}")
