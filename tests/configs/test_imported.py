"""Names that are import paths: where their code is looked for, and what a process that imports it is like afterwards."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.components import resolve_options
from shardstep.configs.errors import InputError
from shardstep.configs.imported import build, find_function, folder_of, load_function, own_files, own_traceback

SAYS = "def say(*arguments):\n    return {!r}\n"


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def said(name: str, *folders: Path) -> Any:
    return load_function(find_function(name, folders))()


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a recipe, and the working folder."""
    recipe = write(
        tmp_path / "recipes", one=SAYS.format("beside"), both=SAYS.format("beside"), sub__in=SAYS.format("sub")
    )
    write(recipe, pack__inner=SAYS.format("beside, in a package"))
    work = write(tmp_path / "work", two=SAYS.format("work"), both=SAYS.format("work"))
    write(work, library__deep__leaf=SAYS.format("leaf"), library__deep____init__="", library____init__="")
    return recipe, work


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.py:say", "beside"),
        ("two.py:say", "work"),
        ("both.py:say", "beside"),
        ("./both.py:say", "beside"),
        ("../work/both.py:say", "work"),
        ("sub/in.py:say", "sub"),
        ("pack.inner:say", "beside, in a package"),
        ("library.deep.leaf:say", "leaf"),
        ("library/deep/leaf.py:say", "leaf"),
        ("library/deep.leaf:say", "leaf"),  # with library/ as the folder
    ],
)
def test_beside_the_recipe_then_in_the_working_folder(name: str, text: str, places: tuple[Path, Path]) -> None:
    assert said(name, *places) == text


def test_a_whole_path_needs_no_folder(places: tuple[Path, Path]) -> None:
    assert load_function(find_function(f"{places[0] / 'one.py'}:say", [places[1]]))() == "beside"


def test_installed_packages_come_last_and_stay_names(places: tuple[Path, Path]) -> None:
    assert find_function("torch.optim:SGD", places) == "torch.optim:SGD"
    assert folder_of("torch.optim:SGD") is None
    write(places[1], json__tool=SAYS.format("own"))
    assert find_function("json.tool:say", places).startswith("/")


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("none.py:say", ["there is no file none.py in", "recipes", "work"]),
        ("none/none.py:say", ["there is no file none.py in", "recipes/none", "work/none"]),
        ("none.none:say", ["there is no module none.none: looked in", "recipes", "work", "installed packages"]),
        ("library.none:say", ["there is no module library.none"]),
        ("torch.none:say", ["there is no module torch.none among the installed packages"]),
        ("torch.optim:Nothing", ["torch.optim has no function Nothing"]),
        ("one.py:sai", ["one.py has no function sai; did you mean say?"]),
        ("one.py:__name__", ["something that is no function"]),
        ("one.py:", ["is not of the form path/to/file.py:function or package.module:function"]),
        (":say", ["is not of the form"]),
        ("one.py:a b", ["is not of the form"]),
        ("1one:say", ["is not of the form"]),
        ("a..b:say", ["is not of the form"]),
    ],
)
def test_what_cannot_be_found_says_where_it_was_looked_for(
    name: str, messages: list[str], places: tuple[Path, Path]
) -> None:
    with pytest.raises(InputError) as caught:
        load_function(find_function(name, places))
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "\n" not in str(caught.value)


def test_files_of_one_name_are_two(tmp_path: Path) -> None:
    text = "from helper import word\n\ndef say():\n    return word\n"
    one = write(tmp_path / "one", net=text, helper="word = 'one'")
    two = write(tmp_path / "two", net=text, helper="word = 'two'")
    first, second = (load_function(find_function("net.py:say", [folder])) for folder in (one, two))
    assert (first(), second()) == ("one", "two")
    assert set(own_files(one)) == set(own_files(two)) == {"net.py", "helper.py"}
    assert own_files(two)["helper.py"] == b"word = 'two'"


@pytest.mark.parametrize("init", [{}, {"pack____init__": ""}], ids=["namespace", "package"])
def test_packages_of_one_name_are_two(init: dict[str, str], tmp_path: Path) -> None:
    text = "from pack.deep.word import word\n\ndef say():\n    return word\n"
    folders = [
        write(tmp_path / name, pack__net=text, pack__deep__word=f"word = {name!r}", **init) for name in ("one", "two")
    ]
    assert [said("pack.net:say", folder) for folder in (*folders, folders[0])] == ["one", "two", "one"]
    assert set(own_files(folders[1])) >= {"pack/net.py", "pack/deep/word.py"}


def test_neighbours_are_found_in_the_body_of_a_builder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, late=f"word = {name!r}", net="def say():\n    import late\n    return late.word\n")
    found = [build("", find_function("net.py:say", [tmp_path / name])) for name in ("one", "two", "one")]
    assert found == ["one", "two", "one"]
    assert set(own_files(tmp_path / "one")) == {"net.py", "late.py"}


@pytest.mark.parametrize("name", ["datasets", "random", "wandb", "json", "torch", "shardstep", "my-net", "numpy"])
def test_a_file_named_like_a_library_does_not_replace_it(name: str, tmp_path: Path) -> None:
    before, path = sys.modules.get(name), list(sys.path)
    write(tmp_path, **{name: SAYS.format("own")})
    assert said(f"{name}.py:say", tmp_path) == "own"
    assert sys.modules.get(name) is before
    assert sys.path == path
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_neighbour_named_like_a_library_does_not_stay(tmp_path: Path) -> None:
    assert "wave" not in sys.modules
    write(tmp_path, net="from wave import word\n\ndef say():\n    return word\n", wave="word = 'own'")
    assert said("net.py:say", tmp_path) == "own"
    import wave

    assert hasattr(wave, "Wave_read")


def test_a_package_whose_name_is_taken_says_so(tmp_path: Path) -> None:
    write(tmp_path, tests__runs=SAYS.format("own"), tests____init__="")
    import tests.runs

    with pytest.raises(
        InputError, match=f"a module tests.runs of {tests.runs.__file__} is loaded already: rename yours"
    ):
        said("tests.runs:say", tmp_path)


# --- options ------------------------------------------------------------------------------------------------------


def whole(images: Any, draws: Any, *, size: float = 0.5, count=3, words: list[str] = ["a"], gain: float, **rest: Any):  # type: ignore[no-untyped-def]  # noqa: B006
    return None


def positional(images: Any, width: int = 4) -> None:
    return None


def clashing(*, sync: int = 1, name: str = "") -> None:
    return None


@pytest.mark.parametrize(
    ("function", "given", "found", "problem"),
    [
        (whole, {"gain": 1}, {"size": 0.5, "count": 3, "words": ["a"], "gain": 1.0}, None),
        (whole, {"gain": "2.5", "count": "7"}, {"count": 7, "gain": 2.5}, None),
        (whole, {"gain": 1, "count": "x"}, None, "part.count: Value 'x' of type 'str' could not be converted"),
        (whole, {"gain": 1, "size": 0.1}, {"size": 0.1}, None),  # the limits of ours, from 1, are of another size
        (whole, {}, None, "part.gain is missing"),
        (whole, {"gain": 1, "word": ["b"]}, None, "part.word is not an option of f.py:f; did you mean words?"),
        (positional, {"width": 3}, None, "options come after a * in its signature, (images: Any, width: int = 4)"),
        (clashing, {}, None, "its option sync has the name of a key of every part: rename it"),
    ],
)
def test_options_are_keyword_only_arguments(
    function: Callable, given: dict[str, Any], found: dict[str, Any] | None, problem: str | None
) -> None:
    resolved, problems = resolve_options(
        "part", {"name": "f.py:f", **given}, {"f.py:f": function}, {"sync": (bool, False)}
    )
    assert bool(problems) == (problem is not None), problems
    assert problem is None or any(problem in text for text in problems), problems
    assert found is None or found.items() <= resolved.items()


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_error_is_told_by_the_frames_of_its_own_code(tmp_path: Path) -> None:
    own = ["import json", "def say(images, *, width=2):", "    return deeper(images)", "def deeper(text):"]
    write(tmp_path, net="\n".join([*own, "    return json.loads(text)"]))
    with pytest.raises(ValueError) as caught:
        build("model.name=net.py:say", find_function("net.py:say", [tmp_path]), "no json", width=3)
    lines = (own_traceback(caught.value) or "").splitlines()
    assert lines[0] == "model.name=net.py:say('no json', width=3) raised JSONDecodeError"
    assert [line.split(", ")[-1] for line in lines if line.startswith("  File")] == ["in say", "in deeper"]
    assert lines[-1].startswith("json.decoder.JSONDecodeError: Expecting value")


def test_an_error_of_an_installed_package_has_its_frames() -> None:
    with pytest.raises(ValueError) as caught:
        build("optimizer.name=torch.optim:SGD", "torch.optim:SGD", [], lr=-1)
    lines = (own_traceback(caught.value) or "").splitlines()
    assert lines[0] == "optimizer.name=torch.optim:SGD([], lr=-1) raised ValueError"
    assert any(line.endswith("in __init__") for line in lines)
    with pytest.raises(ValueError) as caught:  # when a recipe has not called it
        load_function("torch.optim:SGD")([], lr=-1)
    assert own_traceback(caught.value) is None


def test_an_error_of_other_code_is_none_of_it() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert own_traceback(caught.value) is None
