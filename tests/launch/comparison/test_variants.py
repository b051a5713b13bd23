"""The input of a comparison, read from options and files. Nothing is run."""

import math
from pathlib import Path

import pytest
import yaml

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.launch.comparison.variants import Budget, best_rate, next_rate, rate_grid, read_variants
from shardstep.launch.grid import names_of
from shardstep.trainer.validate_recipe import validate_recipe
from tests.conftest import ROOT


def test_grids_become_variants() -> None:
    assert read_variants(["optimizer.name=sgd,adam", "optimizer.lr=0.1,0.01"], None) == {
        "sgd-0.1": ["optimizer.name=sgd", "optimizer.lr=0.1"],
        "sgd-0.01": ["optimizer.name=sgd", "optimizer.lr=0.01"],
        "adam-0.1": ["optimizer.name=adam", "optimizer.lr=0.1"],
        "adam-0.01": ["optimizer.name=adam", "optimizer.lr=0.01"],
    }
    assert names_of([["data.augment=[flip]"], ["data.augment=[ flip]"]]) == ["0-flip", "1-flip"]  # one folder each


def test_commas_in_brackets_separate_nothing() -> None:
    nested = ["data.augment=[flip,{name: translate, pixels: 2}],[]"]
    assert list(read_variants(nested, None).values()) == [
        ["data.augment=[flip,{name: translate, pixels: 2}]"],
        ["data.augment=[]"],
    ]
    for bad in ("data.augment=[flip", "data.augment=flip]", "optimizer.lr=0.1,,0.2", "optimizer.lr="):
        with pytest.raises(InputError, match="is not of the form"):
            read_variants([bad], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [optimizer.name=sgd", "cannot be read as YAML"),
        ("[]", "it holds nothing"),
        ("a: optimizer.name=sgd", "is not a list of section.key=value"),
        ("../a: [optimizer.name=sgd]", "must be a valid folder name"),
        ("a: [optimizer.name]", "is not a list of section.key=value"),
    ],
)
def test_bad_files_of_variants(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_variants([], str(path))


def test_one_kind_of_variants() -> None:
    for over, file in (([], None), (["optimizer.name=sgd"], "optimizers")):
        with pytest.raises(InputError, match="--over KEY=A,B,... .* or --variants FILE"):
            read_variants(over, file)
    with pytest.raises(InputError, match="did you mean optimizers"):
        read_variants([], "optimizer")


def test_our_variants_are_recipes() -> None:
    for path in (ROOT / "configs" / "compare").glob("*.yaml"):
        for overrides in read_variants([], path.stem).values():
            for budget in ("60 s", "3 epochs"):
                validate_recipe(load_recipe("article_cnn", [*overrides, *Budget.parse(budget).overrides]))
    names = set(yaml.safe_load((ROOT / "configs" / "compare" / "optimizers.yaml").read_text()))
    assert names == {
        "adam", "mini_batch", "per_example", "whole_batch", "momentum", "nesterov", "adagrad", "adadelta", "rmsprop",
        "adamw", "muon",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("3 epochs", ("train.duration=3 epochs",)),
        ("500 steps", ("train.duration=500 steps",)),
        ("120 s", ("train.max_wall_s=120", "train.duration=1000000 epochs")),
        ("1.5 min", ("train.max_wall_s=90", "train.duration=1000000 epochs")),
        ("1h", ("train.max_wall_s=3600", "train.duration=1000000 epochs")),
        (None, ()),
    ],
)
def test_budgets(text: str | None, overrides: tuple[str, ...]) -> None:
    assert Budget.parse(text).overrides == overrides


@pytest.mark.parametrize("text", ["", "3", "three epochs", "-1 s", "2 weeks"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(InputError, match="write epochs, steps or a time"):
        Budget.parse(text)


def test_rates() -> None:
    assert rate_grid(0.01, 3) == [0.00316, 0.01, 0.0316]
    assert rate_grid(0.01, 4) == [0.00316, 0.01, 0.0316, 0.1]
    assert rate_grid(1, 5, factor=3) == [0.111, 0.333, 1, 3, 9]


def test_a_search_goes_on_at_an_edge_only() -> None:
    losses = {0.316: 2.0, 1.0: 1.0, 3.16: 3.0}
    assert (best_rate(losses), next_rate(losses, base=1)) == (1.0, None)
    assert next_rate(losses | {3.16: 0.5}, base=1) == 10  # not 3.16 x sqrt(10) = 9.99
    assert next_rate(losses | {0.316: 0.5}, base=1) == 0.1
    assert next_rate(losses | {3.16: math.inf}, base=1) is None
    nothing_worked = dict.fromkeys(losses, math.inf)
    assert (best_rate(nothing_worked), next_rate(nothing_worked, base=1)) == (None, None)
    assert best_rate({}) is None
