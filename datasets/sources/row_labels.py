"""The columns of a table to the labels of its rows: one name each, or several names with their shares."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.datasets.class_names import class_name, label_names
from shardstep.datasets.label_sets import NamedLabel, hold_several, several_names, share_of
from shardstep.datasets.sources.tables import (
    LabelOptions,
    cell_text,
    choose_label_column,
    columns_named,
    shares_columns,
)  # fmt: skip


@dataclass(frozen=True)
class RowLabels:
    """The labels of a table's rows, all of one kind: one label each, or several."""

    column: str  # or the columns, separated by commas
    of_rows: Sequence[NamedLabel]
    classes: list[str] | None = None  # where each has a column


def labels_of_rows(
    where: Path, columns: Mapping[str, Sequence[Any]], options: LabelOptions, apart: Collection[str | None]
) -> RowLabels:
    """Read the column of labels, or several columns of shares, one for each class.

    Without a given column, the columns are taken that hold nothing but 0 and 1, where no other's name says label.

    Args:
        where: the table, for messages.
        columns: of the table, by name.
        apart: columns that hold something else.

    Raises:
        InputError: there is no such column, or no plain one, or labels in it cannot be read.
    """
    given = options.label_column
    shares = shares_columns(columns, given, where)
    if not shares and given is None and not columns_named(columns, None, "label", where):
        shares = [name for name in columns if name not in apart and _is_zeros_and_ones(columns[name])]
    if len(shares) > 1:
        names = [class_name(name) for name in shares]
        labels = labels_of_shares(where, names, zip(*(columns[name] for name in shares), strict=True), given is None)
        return RowLabels(given or ",".join(shares), labels, names)
    column = choose_label_column(list(columns), given, apart, where)
    place = f"{where}, column {column}"
    if options.separator is not None or hold_several(columns[column]):
        return RowLabels(column, several_names(columns[column], place, options.separator))
    return RowLabels(column, label_names(columns[column], place))


def labels_of_shares(
    where: Path | str, classes: Sequence[str], rows: Iterable[Iterable[object]], may_be_one: bool = True
) -> Sequence[NamedLabel]:
    """Return the labels of rows with a share for each class.

    Args:
        where: for messages.
        may_be_one: whether these are one label each where every row has exactly one class.

    Raises:
        InputError: a share is not a number from 0 to 1.
    """
    try:
        labels = [
            tuple((name, share) for name, cell in zip(classes, row, strict=True) if (share := share_of(cell, name)))
            for row in rows
        ]
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if may_be_one and all(len(label) == 1 and label[0][1] == 1 for label in labels):
        return [label[0][0] for label in labels]
    return labels


def _is_zeros_and_ones(cells: Sequence[Any]) -> bool:
    return all(cell_text(cell) in ("0", "1", "0.0", "1.0") for cell in cells)
