"""Image files whose labels are in a table: the table and a tree of files in, a Source out."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.configs.text import listed
from shardstep.datasets.class_names import sorted_classes
from shardstep.datasets.input_files import FileTree, FoundImages, find_images, joined, read_file
from shardstep.datasets.label_sets import NamedLabel, names_in
from shardstep.datasets.sources.class_folders import find_split_folder, split_of
from shardstep.datasets.sources.file_names import files_of_names
from shardstep.datasets.sources.row_labels import labels_of_rows
from shardstep.datasets.sources.source import START_BYTES, Source, numbered_labels
from shardstep.datasets.sources.tables import LabelOptions, LabelTable, cell_text, columns_named, read_table

LABELLED_BY = "images labelled by"  # begins the description of such a Source
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as Hugging Face's imagefolder has them
_MOST_NAMED = 20  # problems in one message


def open_labelled_tree(tree: FileTree, split: str, options: LabelOptions) -> Source:
    """Make a Source of the files in a tree that the rows of `options.table` name.

    Of a table with a split column, a split has the rows that say so; else the rows of files in the split's folder, if there
    are such folders; else all of them. {split} in the table's path stands for a table for each split.

    Raises:
        InputError: the table cannot be read, has no plain columns of images and labels, has rows for an image that do not
            agree, or names no image.
    """
    assert options.table is not None
    path = _table_path(options.table, split)
    table = read_table(path, _content(path, partial(read_file, path)))
    has_own_table, folder, has_folders = "{split}" in options.table, "", False
    if _splits_of_rows(table) is None:
        try:
            folder, has_folders = find_split_folder(tree, split)
        except InputError:  # the folders are of other splits: its own table names the files
            if not has_own_table:
                raise
    in_tree = os.path.relpath(os.path.realpath(path), os.path.realpath(tree.where))
    return label_files(tree, split, folder if has_folders else "", table, in_tree, options, has_own_table)


def open_metadata_tree(tree: FileTree, split: str, options: LabelOptions) -> Source | None:
    """Make a Source of a tree with metadata.csv, .jsonl or .parquet, as Hugging Face's imagefolder reads it.

    It is in the split's folder, or beside these folders, and has a column file_name. None without one that has labels, too.

    Raises:
        InputError: see open_labelled_tree.
    """
    folder, has_splits = find_split_folder(tree, split)
    for place in dict.fromkeys([folder, ""]):
        names = {entry.name for entry in tree.entries(place) if entry.kind == "file"}
        for path in [joined(place, name) for name in _METADATA_NAMES if name in names]:
            data = _content(tree.where / path, partial(tree.read, path))
            if b"file_name" not in data:  # another program's file of this name
                continue
            table = read_table(tree.where / path, data)
            labels = columns_named(table.columns, options.label_column, "label", table.path)
            if len(labels) == 1 and "file_name" in table.columns:
                options = LabelOptions(path, options.image_column or "file_name", labels[0])
                return label_files(tree, split, folder if has_splits else "", table, path, options, has_splits)
    return None


def label_files(
    tree: FileTree, split: str, folder: str, table: LabelTable, table_path: str, options: LabelOptions, has_splits: bool
) -> Source:
    """Make a Source of the files in a tree that the rows of a table name; see open_labelled_tree for the errors.

    Args:
        folder: of the split; "" if all files are its own.
        table_path: of the table in the tree, if it is there: it is not left out.
        has_splits: whether the table holds one split, for a reason other than its column or the folder.
    """
    found = find_images(tree, used=(table_path,))
    files = found.images
    image_column, meant = _images_of_rows(tree, table, options, files, folder)
    row_labels = labels_of_rows(table.path, table.columns, options, (image_column, _split_column(table)))
    labels = row_labels.of_rows
    splits = _splits_of_rows(table)
    names = [cell_text(value) for value in table.columns[image_column]]
    inside = f"{folder}/" if folder else ""

    others, rows = Counter[str](), list[int]()
    for row, numbers in enumerate(meant):
        if splits and splits[row] != split:
            others[splits[row] or "no split"] += 1
        elif len(numbers) == 1 and not files[numbers[0]].startswith(inside):
            others[f"files outside {inside}"] += 1
        else:
            rows.append(row)
    label_of = _labels_of_files(table.path, rows, names, labels, meant, found, options.separator is not None)
    named = {number for numbers in meant for number in numbers}
    for number, file in enumerate(files):
        if number not in named and file.startswith(inside):
            found.left_out.add("unlabelled image", file)

    notes = found.notes(tree.where)
    if others.keys() - {"train", "test"}:
        counted = ", ".join(f"{number:,} of {which}" for which, number in others.items())
        notes.append(f"{table.path}: rows that are not used for {split}: {counted}")
    if not label_of:
        raise InputError("; ".join([f"{table.path} labels no image in {tree.where} for {split}", *notes]))
    # Classes of all splits, so that each of them has the same.
    classes = row_labels.classes or sorted_classes(
        name for label, numbers in zip(labels, meant, strict=True) if numbers for name in names_in(label)
    )
    chosen = sorted(label_of)
    return Source(
        f"{LABELLED_BY} the column {row_labels.column} of {table.path.name}",
        classes,
        numbered_labels([label_of[number] for number in chosen], classes),
        lambda number: tree.read(files[chosen[number]]),
        lambda number: files[chosen[number]],
        has_splits or splits is not None or folder != "",
        notes=notes,
        start=lambda number: tree.read(files[chosen[number]], START_BYTES),
    )


def _labels_of_files(
    where: Path,
    rows: list[int],
    names: list[str],
    labels: Sequence[NamedLabel],
    meant: list[list[int]],
    found: FoundImages,
    rows_add_up: bool,
) -> dict[int, NamedLabel]:
    """Return the label of each file, by its number, from some rows of a table; the rows without one are left out.

    Raises:
        InputError: a row may mean several files, or a file has several rows that do not add up.
    """
    label_of: dict[int, NamedLabel] = {}
    problems = []
    for row in rows:
        name, label, numbers = names[row], labels[row], meant[row]
        files = [found.images[number] for number in numbers]
        if len(numbers) > 1:
            problems.append(f"{name} may be {listed(files, 3)}: write more of the path in the table")
        elif not numbers:
            found.left_out.add("missing file" if name else "empty name", name or f"row {row + 1}")
        elif label == "":
            found.left_out.add("empty label", name)
        elif label_of.get(numbers[0]) == label:
            found.left_out.add("repeated row", name)
        elif (former := label_of.setdefault(numbers[0], label)) != label:
            if rows_add_up and not isinstance(former, str) and not isinstance(label, str):
                label_of[numbers[0]] = tuple((dict(former) | dict(label)).items())
            else:
                both = listed(sorted({*names_in(former), *names_in(label)}))
                problems.append(f"{files[0]} has the labels {both}")
    if problems:
        remedy = "if images have several, --label-separator (data.label_separator) lets their rows add up"
        headline = f"{where} does not give each image one row ({remedy})"
        raise InputError.from_problems(headline, problems, _MOST_NAMED)
    return label_of


def is_labelled_by(description: str, options: LabelOptions, split: str) -> bool:
    """Check by names whether a Source of this description has the labels of a table."""
    assert options.table is not None
    column = "the column " if options.label_column is None else f"the column {options.label_column} of "
    is_table = description.endswith(f" of {_table_path(options.table, split).name}")
    return is_table and description.startswith(f"{LABELLED_BY} {column}")


def _content(path: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except ValueError as error:
        raise InputError(f"{path} {error}") from None


def _table_path(table: str, split: str) -> Path:
    return Path(table.replace("{split}", split)).expanduser()


def _images_of_rows(
    tree: FileTree, table: LabelTable, options: LabelOptions, files: list[str], folder: str
) -> tuple[str, list[list[int]]]:
    """Return the column of images, and the numbers of the files that each row may mean.

    Where names of columns do not decide, the column whose values name the most files does.
    """
    candidates = columns_named(table.columns, options.image_column, "image", table.path) or list(table.columns)
    root = str(tree.where.absolute())
    meant = {
        column: files_of_names([cell_text(value) for value in table.columns[column]], root, files, folder)
        for column in candidates
    }
    column = max(candidates, key=lambda column: sum(map(bool, meant[column])))
    if not any(meant[column]):
        values = "; ".join(
            f"{name} has {listed([cell_text(value) for value in table.columns[name][:3]])}" for name in candidates
        )
        images = f"the images are {listed(files, 3)}" if files else "there are no images"
        raise InputError(
            f"no row of {table.path} names an image in {tree.where}: column {values}; {images}. Choose the column with "
            f"--image-column (data.image_column in a recipe)"
        )
    return column, meant[column]


def _split_column(table: LabelTable) -> str | None:
    """Return the column whose name and values are those of splits, if there is one."""
    columns = columns_named(table.columns, None, "split", table.path)
    return next((name for name in columns if any(split_of(cell_text(value)) for value in table.columns[name])), None)


def _splits_of_rows(table: LabelTable) -> list[str | None] | None:
    column = _split_column(table)
    return None if column is None else [split_of(cell_text(value)) for value in table.columns[column]]
