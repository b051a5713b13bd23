"""Tables to columns: .csv, .tsv, .jsonl, .parquet, and .txt lists of names and labels.

A table whose first line has the name of an image has no line of column names; its columns are called 1, 2, ...
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, listed, printable
from shardstep.datasets.input_files import IMAGE_EXTENSIONS, split_name
from shardstep.datasets.sources.parquet import open_columns

_SEPARATORS = {"csv": ",;\t", "tsv": "\t", "txt": "\t,; "}  # the one that is most frequent in the first line separates
TABLE_EXTENSIONS = (*_SEPARATORS, "jsonl", "parquet")
_MOST_LETTERS = 1 << 20  # of a value in a CSV file
_PICTURE = "image|img|photo|picture|pic"
_COLUMN_NAMES = {  # in lower case, without what is neither letter nor digit
    "image": rf"({_PICTURE}|file|rel|relative|full|isic)?s?(file)?(name|path|id|key)|({_PICTURE}|file|fname|idcode)s?",
    "label": r"(image)?(label|class|target|category|y)(s|es|name|id|idx|index)?|categories|breed|species",
    "split": r"(data)?(split|subset|partition|set|usage|phase)s?",
}


@dataclass(frozen=True)
class LabelOptions:
    """What a person says about labels: the path of their table, and its columns where their names do not tell.

    In the path, {split} stands for train or test. Several columns of labels, separated by commas, hold the share of a class
    each, such as 0 or 1. With a separator, texts hold several labels, and the rows of one image add up.
    """

    table: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    separator: str | None = None

    def __bool__(self) -> bool:
        return any((self.table, self.image_column, self.label_column, self.separator))


NO_OPTIONS = LabelOptions()


@dataclass(frozen=True)
class LabelTable:
    """Columns of one length, by name."""

    path: Path
    columns: dict[str, Sequence[Any]]


def columns_named(
    columns: Iterable[str], given: str | None, kind: Literal["image", "label", "split"], where: Path
) -> list[str]:
    """Return the given column, else those whose names say that they are of a kind.

    Raises:
        InputError: there is no column of the given name.
    """
    columns = list(columns)
    if given is not None and given not in columns:
        raise InputError(f"{where} has no column {listed([given])}, only {listed(columns, most=30)}")
    if given is not None:
        return [given]
    return [name for name in columns if re.fullmatch(_COLUMN_NAMES[kind], re.sub(r"[\W_]", "", name.lower()))]


def shares_columns(columns: Collection[str], given: str | None, where: Path) -> list[str]:
    """Return the given columns of shares, if there are several; else an empty list.

    Raises:
        InputError: there is no column of one of the names.
    """
    if given is None or given in columns:
        return []
    names = [name.strip() for name in next(csv.reader([given], skipinitialspace=True))]
    if len(names) > 1:
        for name in names:
            columns_named(columns, name, "label", where)
    return names if len(names) > 1 else []


def choose_label_column(columns: Sequence[str], given: str | None, apart: Collection[str | None], where: Path) -> str:
    """Return the given column of labels, the one whose name says so, or the only one left besides those in `apart`.

    Raises:
        InputError: there is no such column, or no plain one.
    """
    named = [name for name in columns_named(columns, given, "label", where) if name == given or name not in apart]
    found = named or [name for name in columns if name not in apart]
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{where}: which column has the labels? Choose with --label-column (data.label_column in a recipe) among "
        f"{listed(columns, most=30)}"
    )


def read_table(path: Path, data: bytes) -> LabelTable:
    """Read a table by the end of its name.

    Args:
        path: of the table; only its name is looked at.
        data: its content.

    Raises:
        InputError: it is no such table, or has no rows; the message says the line.
    """
    extension = split_name(path.name)[1]
    if extension not in TABLE_EXTENSIONS:
        raise InputError(f"{path} is no table of labels: give a file that ends in {', '.join(TABLE_EXTENSIONS)}")
    if extension == "parquet":
        table = _parquet(path, data)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 from byte {error.start} on: save it as UTF-8") from None
        table = _json_lines(path, text) if extension == "jsonl" else _separated(path, text, _SEPARATORS[extension])
    if not any(table.columns.values()):
        raise InputError(f"{path} has no rows")
    return table


def _separated(path: Path, text: str, separators: str) -> LabelTable:
    separator = max(separators, key=text.lstrip().partition("\n")[0].count)
    rows = _rows_between_spaces(text) if separator == " " else _rows(path, text, separator)
    names = rows[0][1] if rows else []
    if any(split_name(name)[1] in IMAGE_EXTENSIONS for name in names):
        names = [str(number) for number in range(1, len(names) + 1)]
    else:
        rows = rows[1:]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"{path} has two columns of the name {listed(twice)}")
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {line}: {count(len(row), 'value')} for {count(len(names), 'column')}")
    return LabelTable(path, {name: [row[place] for _, row in rows] for place, name in enumerate(names)})


def _rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Return the values in each row that has some, with its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    former_limit = csv.field_size_limit(_MOST_LETTERS)
    try:
        rows = [([value.strip() for value in row], reader.line_num) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; write a quote inside quotes twice") from None
    finally:
        csv.field_size_limit(former_limit)
    return [(line, row) for row, line in rows if any(row)]


def _rows_between_spaces(text: str) -> list[tuple[int, list[str]]]:
    return [(number, line.split()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_lines(path: Path, text: str) -> LabelTable:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a mapping of columns to values: {printable(line[:60])}")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return LabelTable(path, {name: [row.get(name) for row in rows] for name in names})


def _parquet(path: Path, data: bytes) -> LabelTable:
    with open_columns(path, io.BytesIO(data)) as file:
        content = file.read()
        return LabelTable(path, {name: content.column(name).to_pylist() for name in content.column_names})


def cell_text(value: Any) -> str:
    """Return what is in a cell as text; "" for nothing, "3" for 3.0."""
    if value is None or value != value:  # NaN
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
