"""Class names: text from folders, tables, tars, options and manifests, in one Unicode form and one order."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
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
# A name of `--classes`, in quotes or without the blanks around it, and what ends it.
_CSV_NAME = re.compile(r'[ \t]*(?:"(?P<quoted>(?:[^"]|"")*)"[ \t]*|(?P<plain>(?!")[^,\n]*?)[ \t\r]*)(?P<end>,|\n|\Z)')


def class_name(text: str, remedy: str = "rename its folder") -> str:
    """Return a class name in Unicode's form NFC: macOS writes "é" as two characters, others as one.

    Raises:
        InputError: its bytes are not UTF-8; the message ends with the `remedy`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="backslashreplace").decode()
        raise InputError(f"the class name {shown} is not UTF-8: {remedy}") from None
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
    return [class_name(text, f"save {where} as UTF-8") for text in texts]


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

    Blanks around a name are its own in quotes and in a file, and else left out.

    Raises:
        InputError: the file cannot be read, the quotes do not match, or a name is empty, not UTF-8 or occurs twice.
    """
    names = _lines(option) if option.startswith("@") else _fields(option)
    names = [
        class_name(name, "give --classes in UTF-8, or --classes @FILE with a name a line in UTF-8") for name in names
    ]
    if not names or "" in names:
        raise InputError("--classes: a name is empty")
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise InputError(f"--classes: each name needs one label, but some occur twice: {listed(twice)}")
    return names


def doubtful_names_note(classes: Sequence[str]) -> str | None:
    """Return a line on names that people mistake for each other, or that have blanks around them; None without any.

    Names look alike if they differ only by blanks, by characters that nobody sees, such as a zero-width space, or by case.
    The letters a and A may well be two classes.
    """
    alike = defaultdict(list)
    for name in classes:
        seen = "".join(letter for letter in unicodedata.normalize("NFKC", name) if _is_seen(letter))
        alike[seen.casefold() if len(seen) > 1 else seen].append(name)
    groups = [" and ".join(map(_spelled, group)) for group in alike.values() if len(group) > 1]
    blank = [_spelled(name) for name in classes if name != name.strip()]
    parts = [f"classes whose names look alike: {listed(groups)}"] if groups else []
    parts += [f"class names with blanks around them: {listed(blank)}"] if blank else []
    return f"{'; '.join(parts)}. If that is a mistake, correct the names and write the shards again" if parts else None


def _is_seen(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "LMNPS"


def _spelled(name: str) -> str:
    """Return a name in quotes, with escapes for what cannot be seen, except blanks."""
    shown = (letter if letter == " " or _is_seen(letter) else ascii(letter)[1:-1] for letter in name)
    return f"'{''.join(shown)}'"


def _fields(text: str) -> list[str]:
    names, start, text = [], 0, text.removesuffix("\n")
    while field := _CSV_NAME.match(text, start):
        quoted = field["quoted"]
        names.append(field["plain"] if quoted is None else quoted.replace('""', '"'))
        if not field["end"]:
            return names
        start = field.end()
    raise InputError(
        f'--classes {text}: the quotes do not match. Write a name with a comma in quotes ("cat, big",dog), a quote '
        f"in quotes twice, or give --classes @FILE with one name a line"
    )


def _lines(option: str) -> list[str]:
    try:
        text = Path(option[1:]).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"--classes {option} cannot be read: it is not UTF-8") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        first = option.partition(",")[0]
        hint = f""". If {first} is the name of a class, put it in quotes: --classes '"{first}",...'"""
        raise InputError(f"--classes {option} cannot be read: {reason}{hint}") from None
    return text.removesuffix("\n").split("\n")
