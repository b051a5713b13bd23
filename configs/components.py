"""Open sections of a recipe, checked against the functions that they name.

`{"name": "sgd", "momentum": 0.9}` and a mapping of names to functions go in; the same section with every option filled in
and converted to its type comes out. The options are the function's keyword arguments: its signature is the schema, so a
new model or transform needs only its function.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SIMPLE_TYPES = (bool, int, float, str)
_TOLD = ("pretrained",)  # options of every model that a builder may take, too


def neighbours(word: str, known: Collection[str]) -> str:
    """Return a hint for an unknown word: the closest known words, or all of them if none is close."""
    close = [name for name in known if name.endswith("/" + word.lower())]
    close = close or difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    close = close or [name for name in known if len(word) > 2 and word.lower() in name.lower()][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(sorted(known))}" if known else "there are none"


def options_of(function: Callable) -> dict[str, Any]:
    """Return a function's options and defaults: its keyword-only parameters; for a class, also all that have defaults."""
    wanted = inspect.Parameter.KEYWORD_ONLY
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is wanted or (inspect.isclass(function) and parameter.default is not inspect.Parameter.empty)
    }


def resolve_options(
    section: str,
    given: Mapping[str, Any],
    functions: Mapping[str, Callable],
    common: Mapping[str, tuple[Any, Any]] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Check one open section and fill in the defaults.

    Args:
        section: the name of the section in messages, such as "optimizer".
        given: `name` and options from the recipe.
        functions: the known functions by name.
        common: type and default of further options that are valid with every name.

    Returns:
        The section with all options, converted, and the problems found (empty if there are none).
    """
    common = common or {}
    name = given.get("name")
    if name is None:
        return dict(given), [f"{section}.name is missing; known: {', '.join(sorted(functions))}"]
    if not isinstance(name, str) or not all(isinstance(key, str) for key in given):
        return dict(given), [f"{section} must map names to values, including one `name`, not {dict(given)}"]
    if name not in functions:
        hint = f"give a function of it, {name}:FUNCTION" if name.endswith(".py") else neighbours(name, functions)
        return dict(given), [f"{section}.name={name} is unknown; {hint}"]

    function, problems = functions[name], []
    defaults = options_of(function)
    resolved: dict[str, Any] = {"name": name}
    of_all = {key: value for key, (_, value) in common.items() if key not in defaults}
    for key, default in (defaults | of_all).items():
        if key not in given:
            if default is inspect.Parameter.empty:
                problems.append(f"{section}.{key} is missing: {name} needs it")
            else:
                resolved[key] = list(default) if isinstance(default, tuple) else default
        else:
            try:
                hint = hint_of(function, key) if key in defaults else common[key][0]
                resolved[key] = convert(given[key], hint)
                check_limits(key, resolved[key], default)
            except ValueError as error:
                problems.append(f"{section}.{key}: {error}")
    problems += [
        f"{section}.name={name}: its option {key} has the name of a key of every {section}: rename it"
        for key in ("name", *common)
        if key in defaults and key not in _TOLD
    ]
    for key in given:
        if key != "name" and key not in defaults and key not in common:
            hint = neighbours(key, [*defaults, *common])
            if key in inspect.signature(function).parameters:
                hint = f"options come after a * in its signature, {inspect.signature(function)}"
            problems.append(f"{section}.{key} is not an option of {name}; {hint}")
    return resolved, problems


def refusal(value: Any, error: Exception) -> str:
    """Return why OmegaConf rejects a value."""
    reason = first_line(error)
    return f"{value} is not a list: write [{value}]" if "is not a ListConfig" in reason else reason


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the context that its library adds below."""
    return str(error).split("\n")[0]


def convert(value: Any, hint: Any) -> Any:
    """Convert a YAML value to the type of a parameter, as OmegaConf does for its structured configs.

    Raises:
        ValueError: the value does not fit; the message says which values do.
    """
    # A class with one field makes OmegaConf check the value: numbers, strings, choices, lists and tuples of them.
    holder = dataclasses.make_dataclass("Option", [("value", hint)])
    try:
        result = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(holder), {"value": value}), resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(refusal(value, error)) from None
    assert isinstance(result, dict)
    plain = result["value"]
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ValueError(f"{plain} is NaN or infinite")
    return list(plain) if isinstance(plain, tuple) else plain


LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lr", "weight_decay", "auxiliary_weight", "norm_eps", "pixels"), (0, math.inf)),
    **dict.fromkeys(("gamma", "rise", "start", "final", "warmup_start"), (0, math.inf)),
    **dict.fromkeys(("layers", "hidden", "widths", "head", "size", "epochs"), (1, math.inf)),
    **dict.fromkeys(("momentum", "decay", "label_smoothing", "dropout", "feature_dropout"), (0, 1)),
    **dict.fromkeys(("probability", "brightness", "contrast", "saturation"), (0, 1)),
    **{"hue": (0, 0.5), "degrees": (0, 180), "padding": (0, math.inf), "num_ops": (1, 99), "magnitude": (0, 30)},
    "ns_steps": (0, 99),
}
"""Smallest and largest value of an option, wherever an option has this name; in a list, of each number."""


def check_limits(key: str, value: Any, default: Any = None) -> None:
    """Check an option's numbers against LIMITS, unless its own default is outside of them: then its name means another thing.

    Raises:
        ValueError: a number is outside its limits; the message gives them.
    """
    least, most = LIMITS.get(key, (-math.inf, math.inf))
    if isinstance(default, (int, float)) and not least <= default <= most:
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not least <= number <= most:
            raise ValueError(f"{number} must be at least {least}" + (f" and at most {most}" if most < math.inf else ""))


def hint_of(function: Callable, key: str) -> Any:
    """Return a parameter's type in terms that OmegaConf knows: without the tensors that torch's optimizers also accept.

    That of a parameter without an annotation is the type of its default.
    """
    target = function.__init__ if inspect.isclass(function) else function
    parameter = inspect.signature(function).parameters[key]
    if parameter.annotation is inspect.Parameter.empty:
        return type(parameter.default) if isinstance(parameter.default, SIMPLE_TYPES) else Any
    try:
        return _without_tensors(typing.get_type_hints(target).get(key, Any))
    except (NameError, AttributeError, TypeError):  # an annotation that only type checkers resolve
        return Any


def _without_tensors(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kept = tuple(
            _without_tensors(argument)
            for argument in arguments
            if argument in (*SIMPLE_TYPES, type(None)) or typing.get_origin(argument) is not None
        )
        return typing.Union[kept] if set(kept) - {type(None)} else Any  # noqa: UP007 - built from a tuple
    if origin is tuple and Ellipsis in arguments:  # OmegaConf has no tuples of any length
        return list[arguments[0]]  # type: ignore[valid-type]
    if origin is tuple:
        return tuple[tuple(_without_tensors(argument) for argument in arguments)]  # type: ignore[misc]
    known = hint in (*SIMPLE_TYPES, Any) or origin in (list, dict, typing.Literal)
    return hint if known else Any
