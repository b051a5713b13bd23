"""Class names: text from folders, tables, tars, options and manifests, in one Unicode form and one order."""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import listed

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")  # pandas writes 3.0 into a column that has gaps
_BOXES = re.compile(r"(n\d{8}) (-?\d+ ?){4}(\1 (-?\d+ ?){4})*")  # of one class, in ImageNet's LOC_val_solution.csv
_NUMBERS = re.compile(r"\d+( +\d+)*")
_BETWEEN_LABELS = re.compile(r"\s*[|;,]\s*")


def class_name(text: str) -> str:
    """Return a class name in Unicode's form NFC: macOS writes "é" as two characters, others as one.

    Raises:
        InputError: it is the name of a folder whose bytes are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise InputError(f"the class name {shown} is not UTF-8: rename its folder") from None
    return unicodedata.normalize("NFC", text)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Return the different names in the order of their labels: as numbers if all are whole numbers, else as text."""
    unique = set(names)
    return sorted(unique, key=lambda name: (int(name), name)) if are_whole_numbers(unique) else sorted(unique)


def are_whole_numbers(names: Iterable[str]) -> bool:
    """Check whether all names are whole numbers, with at most 18 digits."""
    return all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names)


def label_names(labels: Sequence[object], where: str) -> list[str]:
    """Return labels, as a table or a file has them, as class names; "" for an empty one.

    Args:
        labels: text, numbers, or None. 3, 3.0 and "3.0" are one class.
        where: for messages.

    Raises:
        InputError: they are measurements, or there are several in one.
    """
    try:
        texts = [label_text(label) for label in labels]
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    different = set(texts) - {""}
    if different and all(map(_BOXES.fullmatch, different)):
        return label_names([text.partition(" ")[0] for text in texts], where)
    if different and all(map(_NUMBER.fullmatch, different)):
        fractions = sorted(text for text in different if not _WHOLE.fullmatch(text))
        if fractions:
            raise InputError(
                f"{where}: labels such as {listed(fractions, most=3)} are measurements, not classes. If they are names of "
                f"classes, write them with a letter, such as grade-{fractions[0]}"
            )
        return [_WHOLE.sub(r"\1", text) for text in texts]
    if all(map(_NUMBERS.fullmatch, different)):  # such as 16 0
        several = sorted(text for text in different if " " in text)
    else:
        parts = {text: _BETWEEN_LABELS.split(text) for text in different}
        several = sorted(text for text, some in parts.items() if len(some) > 1 and different >= {*some})
    if several:
        raise InputError(
            f"{where}: {listed(several, most=2)} are several labels in one. If images have several, say what separates them "
            f"with --label-separator (data.label_separator in a recipe)"
        )
    return [class_name(text) for text in texts]


def label_text(label: object) -> str:
    """Return a label as text, "" if there is none; that in a list of one. Raises ValueError if there are several."""
    if isinstance(label, list | tuple | np.ndarray) and len(label) == 1:
        return label_text(label[0])
    if isinstance(label, list | tuple | dict | set | np.ndarray):
        raise ValueError(f"{label!r:.80} is not one label")
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    text = str(label).strip()
    return "" if text.lower() == "nan" else text


def class_names_of_manifest(names: list[str]) -> list[str]:
    """Return the names of a manifest; as they are, if an earlier version wrote two that are one name in form NFC."""
    normal = [unicodedata.normalize("NFC", name) for name in names]
    return normal if len(set(normal)) == len(names) else names


def parse_class_names(option: str) -> list[str]:
    """Parse `--classes`: names separated by commas, as in a CSV file, or @FILE with one name a line.

    Raises:
        InputError: the file cannot be read, the quotes do not match, or a name is empty or occurs twice.
    """
    names = _lines(Path(option[1:]).expanduser()) if option.startswith("@") else _fields(option)
    names = [class_name(name) for name in names]
    if not names or "" in names:
        raise InputError("--classes: a name is empty")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--classes: each name needs one label, but some occur twice: {', '.join(twice)}")
    return names


def _fields(text: str) -> list[str]:
    try:
        rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        return [name for row in rows for name in row]
    except csv.Error:
        raise InputError(
            f'--classes {text}: the quotes do not match. Write a name with a comma in quotes ("cat, big",dog), a quote '
            f"in quotes twice, or give --classes @FILE with one name a line"
        ) from None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"--classes @{path} cannot be read: {reason}") from None
    return text.removesuffix("\n").split("\n")
