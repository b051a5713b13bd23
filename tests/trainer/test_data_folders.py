"""The folders of data sets: a typo in one is not taken for a new data set."""

from pathlib import Path

import pytest
import yaml

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.datasets.manifest import did_you_mean, open_shards
from shardstep.datasets.write import write_shards
from shardstep.trainer.data import check_given_folders, missing_sets
from tests.distributed import run_command

OURS = {
    "run": {"dir": "run"},
    "data": {"source": "synthetic:20", "train": "sets/own/train", "test": "sets/own/test"},
    "model": {"name": "perceptron"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data/cifar10/train, data/cifar10/test, and a recipe whose own folders have no shards yet."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_shards("synthetic:20", split, tmp_path / "data" / "cifar10" / split)
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(OURS))
    (tmp_path / "data" / "cifar10" / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "overrides", "problem"),
    [
        ("quickstart", ["data.train=data/cifar10/trian"], "did you mean data/cifar10/train?"),
        ("quickstart", ["data.test=data/cifar10/tset"], "did you mean data/cifar10/test?"),
        ("quickstart", ["data.train=data/cifra10/train"], "did you mean data/cifar10/train?"),
        ("quickstart", ["data.train=dat/cifar10/train"], "did you mean data/cifar10/train"),
        ("quickstart", ["data.train=data/cifar10"], "did you mean data/cifar10/"),
        ("quickstart", ["data.train=data/cifar10/train/train"], "did you mean data/cifar10/train"),
        ("quickstart", ["data.train=data/cifar10/empty"], "data.train=data/cifar10/empty holds no shards"),
        ("quickstart", ["data.train=elsewhere"], "data.train=elsewhere holds no shards. To write them there, give"),
        ("quickstart", ["data.train=/nowhere/at/all"], "data.train=/nowhere/at/all holds no shards. To write"),
        ("ours.yaml", ["data.train=sets/own/trian"], "data.source=synthetic:20"),
        ("ours.yaml", ["data.test=data/cifar10/tests"], "did you mean data/cifar10/test?"),
        ("quickstart", ["data.train=data/new/train", "data.source=cifar10"], None),
        ("quickstart", ["data.train=data/new/train", "data.source=null"], None),  # is refused when it is opened
        ("quickstart", ["data.train=data/cifar10/test"], None),
        ("quickstart", ["data.train=./data/../data/cifar10/train"], None),
        ("ours.yaml", [], None),
        ("ours.yaml", ["data.train=sets/own/train", "data.test=./sets/own/test/"], None),
        ("ours.yaml", ["data.train=", "data.test="], "data.train=data/synthetic-20/train holds no shards"),
    ],
)
def test_a_folder_that_is_given_holds_shards(
    recipe: str, overrides: list[str], problem: str | None, folder: Path
) -> None:
    loaded = load_recipe(recipe, overrides)
    if problem is None:
        check_given_folders(loaded)
        return
    with pytest.raises(InputError) as raised:
        check_given_folders(loaded)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_defaults_of_a_built_in_recipe_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for overrides in (
        [],
        ["data.train=data/cifar10/train"],
        ["data.source=digits"],
        ["data.source=digits", "data.train=x"],
    ):
        loaded = load_recipe("quickstart", overrides)
        check_given_folders(loaded)
        assert missing_sets(loaded.recipe.data)


@pytest.mark.parametrize(
    ("recipe", "overrides", "is_refused"),
    [
        ("photos", [], True),
        ("photos", ["data.test=sets/own/test"], True),
        ("photos", ["data.source=null", "data.validation=0.1"], True),
        ("quickstart", ["data.source=null", "data.train=", "data.test="], True),
        ("photos", ["data.source=my/pictures"], False),
        ("photos", ["data.train=sets/own/train", "data.test=sets/own/test"], False),
        ("photos", ["data.mix=[{dir: sets/own/train, weight: 1}, {dir: sets/own/test, weight: 1}]"], False),
    ],
)
def test_a_recipe_needs_images(
    recipe: str, overrides: list[str], is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(recipe, overrides)
    if not is_refused:
        check_given_folders(loaded)
        return
    with pytest.raises(InputError, match=f"recipe {recipe} needs images: give data.source=my/pictures"):
        check_given_folders(loaded)


def test_nothing_is_written_there(folder: Path) -> None:
    for command in (["train"], ["train", "--show-config"], ["doctor"]):
        done = run_command(*command, "ours.yaml", "data.train=data/cifar10/trian", cwd=folder)
        assert done.returncode == (1 if command == ["doctor"] else 2), done.stderr
        assert "did you mean data/cifar10/train?" in " ".join((done.stdout + done.stderr).split())
        assert not (folder / "data" / "cifar10" / "trian").exists()
        assert not (folder / "sets").exists()


def test_opening_a_folder_without_shards_names_what_is_near(folder: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist \(did you mean data/cifar10/train\?\)\. Write"):
        open_shards("data/cifar10/trian")
    with pytest.raises(
        InputError, match=r"manifest.json \(did you mean data/cifar10/test or data/cifar10/train\?\); write"
    ):
        open_shards("data/cifar10")
    assert did_you_mean("a/b/c/d/e/f") == ""
