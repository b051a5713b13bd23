"""Explain the keys of a recipe: type, default and meaning, as configs/schema.py and the named functions have them.

shardstep keys [SECTION]
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from shardstep.configs import schema
from shardstep.configs.components import hint_of, neighbours, options_of
from shardstep.configs.errors import InputError
from shardstep.launch.cli import page_width, run_script

_SECTIONS = {section.name: section for section in dataclasses.fields(schema.Recipe)}
_AUGMENT = "augment"  # not a section, but the entries of data.augment have names and options like one


def main(arguments: list[str]) -> int:
    """Print the keys; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep keys",
        description="Explain the keys of a recipe: type, default and meaning.",
        epilog="Set a key in a YAML file, or as section.key=value on the command line.",
    )
    sections = f"one of {', '.join(_SECTIONS)}, or {_AUGMENT} (what data.augment can name)"
    parser.add_argument("section", nargs="?", help=sections)
    section = parser.parse_args(arguments).section
    if section not in (None, _AUGMENT, *_SECTIONS):
        raise InputError(f"no section {section!r}; {neighbours(section, [*_SECTIONS, _AUGMENT])}")
    for name in [section] if section else _SECTIONS:
        if name in _SECTIONS and name not in schema.OPEN_SECTIONS:
            _print_section(name)
        else:
            _print_open_section(name, with_choices=section is not None)
    return 0


def _print_section(name: str) -> None:
    section: Any = _SECTIONS[name].type
    print(f"{name}: {section.__doc__}\n")
    types_of, meanings = typing.get_type_hints(section), field_docs(section)
    for key in dataclasses.fields(section):
        default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
        print(f"  {name}.{key.name}: {type_text(types_of[key.name])} = {yaml_text(default)}")
        listed = " `shardstep keys augment` lists them." if key.name == _AUGMENT else ""
        _print_wrapped(meanings[key.name] + listed, 6)
    print()


def _print_open_section(name: str, with_choices: bool) -> None:
    if name == _AUGMENT:
        print("augment: each entry of data.augment is NAME, or {name: NAME, OPTION: VALUE, ...}")
    else:
        _print_wrapped(f"{name}: {field_docs(schema.Recipe)[name]}", 0)
        default = getattr(schema.Recipe(), name)
        print(f"  {name}.name: str" + (f" = {default['name']}" if default else ", required"))
        if not with_choices:
            print(f"      `shardstep keys {name}` lists the names, with their options.\n")
            return
    from shardstep.trainer.validate_recipe import NAMED

    functions, common = NAMED[name]
    for choice, function in sorted(functions.items()) if name == "optimizer" else functions.items():
        print(f"\n  {choice}")
        if text := inspect.getdoc(function):
            _print_wrapped(" ".join(text.split("\n\n")[0].split()), 6)
        _print_options({key: (hint_of(function, key), default) for key, default in options_of(function).items()})
    if common:
        print("\n  with any name")
        _print_options(common)
    if name == "model":
        _print_wrapped(
            "Also torchvision/NAME and timm/NAME, for every classifier of theirs: torchvision/resnet18, ...", 2
        )
    print()


def field_docs(section: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def type_text(hint: Any) -> str:
    """Return a type as a recipe's author reads it: "auto|resident|stream", "int or null", "list of str"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(yaml_text, arguments))
    if origin in (typing.Union, types.UnionType):  # hint_of has Any where the annotation has None
        return " or ".join("null" if argument is Any else type_text(argument) for argument in arguments)
    if origin is tuple:
        return f"[{', '.join(map(type_text, arguments))}]"
    if origin is list:
        return "list" if Any in arguments else f"list of {type_text(arguments[0])}"
    if hint is type(None):
        return "null"
    return "any" if hint is Any else str(getattr(hint, "__name__", hint))


def yaml_text(value: Any) -> str:
    """Return a value as one writes it in a recipe."""
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _print_options(options: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (hint, default) in options.items():
        value = ", required" if default is inspect.Parameter.empty else f" = {yaml_text(default)}"
        print(f"      {key}: {type_text(hint)}{value}")


def _print_wrapped(text: str, indent: int) -> None:
    print(*textwrap.wrap(text, page_width(), initial_indent=" " * indent, subsequent_indent=" " * indent), sep="\n")


if __name__ == "__main__":
    run_script(main)
