"""Labels in the tars that others wrote: the field of a sample that holds its label, and what it holds to classes."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, listed, printable
from shardstep.datasets.class_names import are_whole_numbers, label_names, label_text, sorted_classes
from shardstep.datasets.input_files import IMAGE_EXTENSIONS
from shardstep.datasets.label_sets import NamedLabel, named_shares

_LONGEST = 200  # characters of a label; a caption may well be longer
_SHOWN = 30  # characters of what is no label, in a message


@dataclass(frozen=True)
class LabelField:
    """Where the label of a sample is: in <key>.<extension>, and there, if it is JSON, at a path of keys and places.

    In JSON, a list of names or an object of names and shares is several labels.
    """

    extension: str
    path: str = ""
    may_be_name: bool = True  # or else it is a number, in digits alone
    always_several: bool = False  # also where each sample has one

    def __str__(self) -> str:
        return f"{self.extension}:{self.path}" if self.path else self.extension

    def key(self, name: str) -> str | None:
        """Return the key of the sample whose label a member is; None if it is none."""
        end = f".{self.extension}"
        return name[: -len(end)] if name.lower().endswith(end) and len(name) > len(end) else None

    def read(self, data: bytes, first_label: int = 0) -> NamedLabel:
        """Return the label in the bytes of a member, as text, or several labels.

        Raises:
            ValueError: there is none; the message goes on after the member's name.
        """
        try:
            content: Any = data.decode("utf-8-sig")  # Windows may begin a text with a byte order mark
            if not self.may_be_name:
                return _digits(content.strip(), first_label)
            if self.path:
                content = _at(json.loads(content), self.path)
        except UnicodeDecodeError:
            raise ValueError("is not a label: it is not UTF-8") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from None
        if isinstance(content, list | dict):
            labels = named_shares(content)
            for name, _ in labels:
                _check_name(name)
            return labels
        return _check_name(label_text(content))

    def holds(self, data: bytes, labels: Collection[tuple[str, float]]) -> bool:
        """Check whether the bytes of a member hold these numbers or class names, with these shares, and no others."""
        try:
            found = self.read(data)
            shares = ((found, 1.0),) if isinstance(found, str) else found
            return len(shares) == len(labels) and all(
                any(share == np.float32(other) and self._are_same(name, label) for name, other in shares)
                for label, share in labels
            )
        except ValueError:
            return False

    def _are_same(self, text: str, label: str) -> bool:
        names = {text, *label_names([text], str(self))}
        return label in names or (are_whole_numbers([label, *names]) and int(label) in map(int, names))


NUMBERS_IN_CLS = LabelField("cls", may_be_name=False)
SEVERAL_IN_JSON = LabelField("json", "labels", always_several=True)
"""Where the shards that are written here have the labels of samples with several."""


def parse_label_field(option: str) -> LabelField:
    """Parse `--label`: cls, txt, index or another extension, or json:path.to.label.

    Raises:
        InputError: it is neither.
    """
    extension, _, path = option.partition(":")
    extension = extension.lower().lstrip(".")
    if extension in IMAGE_EXTENSIONS or not extension or "/" in extension:
        raise InputError(
            f"--label {option}: give the extension of the files with labels, such as cls or txt, or json:PATH"
        )
    if (extension.rpartition(".")[2] == "json") != bool(path):
        raise InputError(
            f"--label {option}: give json and the path of the label in it, such as json:label or json:meta.name"
        )
    return LabelField(extension, path)


@dataclass(frozen=True)
class Numbering:
    """The classes of the labels in tars, and the label of each text that is one there."""

    classes: list[str]
    label_of: dict[str, int]
    are_names: bool  # whether the labels in the tars are the classes' names; else they are their numbers


def number_labels(
    texts: Collection[str],
    samples: int,
    field: LabelField,
    first_label: int,
    classes: list[str] | None,
    former_classes: list[str] | None,
) -> Numbering:
    """Number the labels of tars. Whole numbers are labels, counted from `first_label`, if `samples` are enough for them.

    Args:
        texts: the labels that occur, as they are in the tars.
        classes: names by label; None takes `former_classes` if they suffice, else the names that occur, or the numbers.

    Raises:
        InputError: the labels do not fit the classes, or begin with a gap.
    """
    names = label_names(texts := list(texts), f"label {field}")
    if not names and classes is None:
        raise InputError(f"no sample has a label in {field}: give the class names")
    are_given_names = field.may_be_name and classes is not None and set(names) <= set(classes)
    if not are_given_names and are_whole_numbers(names):
        numbers = [int(name) - first_label for name in names]
        if classes is not None or not field.may_be_name or max(numbers) < samples:
            if classes is None and max(numbers) < len(former_classes or ()):
                classes = former_classes
            classes = _classes_of_numbers(min(numbers), max(numbers), samples, classes, first_label)
            return Numbering(classes, dict(zip(texts, numbers, strict=True)), False)
    if classes is None:
        classes = former_classes if former_classes and set(names) <= set(former_classes) else sorted_classes(names)
    number_of = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in names if name not in number_of]:
        raise InputError(f"labels that are none of the {count(len(classes), 'class', 'classes')}: {listed(unknown)}")
    return Numbering(classes, {text: number_of[name] for text, name in zip(texts, names, strict=True)}, True)


def _classes_of_numbers(
    smallest: int, largest: int, samples: int, classes: list[str] | None, first_label: int
) -> list[str]:
    """Return the class names for labels, counted from 0; without given ones, numbers as in the tars."""
    low, high = smallest + first_label, largest + first_label
    if smallest < 0:
        raise InputError(f"label {low} is out of range: labels are integers from {first_label}")
    if classes is not None:
        if len(set(classes) - {""}) < len(classes):
            raise InputError("class names must be unique and not empty")
        if largest >= len(classes):
            remedy = f"; if labels count from {low}, add --first-label {low}" if smallest == 1 else ""
            there_are = f"there {'is' if len(classes) == 1 else 'are'} {count(len(classes), 'class', 'classes')}"
            raise InputError(f"label {high} is out of range: {there_are}{remedy}")
        return classes
    if largest >= samples:
        raise InputError(
            f"the largest label is {high}, which would mean {count(largest + 1, 'class', 'classes')} for "
            f"{count(samples, 'sample')}: add `--label cls` to make a class of each label that occurs, or name all classes "
            f"with --classes"
        )
    if smallest > 0:
        raise InputError(
            f"the labels are {low} to {high}, none is {first_label}. If they count from {low}, add --first-label {low}; if "
            f"samples of class {first_label} are only missing here, name all classes with --classes"
        )
    return [str(number) for number in range(first_label, high + 1)]


def _check_name(text: str) -> str:
    if not text:
        raise ValueError("has an empty label")
    if len(text) > _LONGEST or "\n" in text:
        raise ValueError(f"is not a label: {len(text):,} characters of text, {_shown(text)}")
    return text


def _digits(text: str, first_label: int) -> str:
    if not text:
        raise ValueError("has an empty label")
    if not (text.isascii() and text.isdigit() and are_whole_numbers([text])):
        remedy = "to read names, add --label cls"
    elif int(text) < first_label:
        remedy = "give another --first-label"
    else:
        return text
    raise ValueError(f"is not a label ({_shown(text)}): it must be an integer from {first_label}; {remedy}")


def _shown(text: str) -> str:
    return printable(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")


def _at(content: Any, path: str) -> Any:
    """Return what is in JSON at a path such as meta.labels.0. Raises ValueError if nothing is there."""
    if not path:
        return content
    parts = path.split(".")
    for end in range(1, len(parts) + 1):  # a key may have dots
        first, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if isinstance(content, dict) and first in content:
            return _at(content[first], rest)
        if isinstance(content, list) and first.isdecimal() and int(first) < len(content):
            return _at(content[int(first)], rest)
    there = f", only {listed(list(content), most=8)}" if isinstance(content, dict) and content else ""
    raise ValueError(f"has no {parts[0]}{there}")
