"""Class names: text from folders, tars, options and manifests, in one Unicode form."""

import csv
import io
import unicodedata
from pathlib import Path

from shardstep.configs.errors import InputError


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
