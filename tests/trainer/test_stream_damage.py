"""Guarantee 5 while training streams: damage to any file of a data set is reported, or the file is no longer needed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.order import EpochOrder
from shardstep.datasets.tar import BLOCK
from shardstep.trainer.checkpoints import checkpoint_files
from tests.distributed import run_ranks
from tests.runs import failure_of, train_lines, train_ranks, write_recipe

DAMAGED_AT = 3  # steps of 5 samples, when shards of 17 are read one after another: the first one only has been read
SECTIONS: dict[str, Any] = {
    "data": {"mode": "stream", "workers": 1, "window_shards": 1},
    "train": {"global_batch_size": 5, "duration": "2 epochs"},
    "eval": {"every": "1 epochs", "batch_size": 10},
    "checkpoint": {"every": "20 steps"},
}

Damage = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose data nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_ranks(1, write_recipe(folder, shards, **SECTIONS))
    return folder / "run"


def last_shard(shards: Path) -> str:
    """The shard that the first epoch reads last."""
    counts = open_shards(shards / "train").samples_per_shard
    return f"train-{EpochOrder(counts, 0, 0, 1, 1).shards_of(0, len(counts) - 1)[-1]:06d}.tar"


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def flip(path: Path, other: Path) -> None:
    with path.open("r+b") as file:  # in place, as a failing disk does it
        content = bytearray(file.read())
        for place in range(len(content) // 2, len(content), 64):  # one bit in every 64 bytes: every image has some
            content[place] ^= 1
        file.seek(0)
        file.write(content)


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)  # in place, too
    other.write_bytes(one)


def replace(path: Path, other: Path) -> None:
    content = path.with_name("new")  # another file under the old name: who has the old one open does not see it
    shutil.copy(other, content)
    content.replace(path)


def forge(path: Path, other: Path) -> None:
    """Replace all images by the smallest: each can be decoded, and all but one are wrong."""
    opened = open_shards(path.parent)
    entries = opened.index[[opened.shard_path(int(entry["shard"])) == path for entry in opened.index]]
    content = path.read_bytes()
    smallest = entries[entries["size"].argmin()]
    begin = int(smallest["block"]) * BLOCK
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(int(entry["block"]) * BLOCK)
            file.write(content[begin : begin + int(smallest["size"])])


def train_each(recipes: list[str], damages: list[tuple[Damage, Path, Path] | None]) -> list[tuple[int, str, str]]:
    """Runs in a rank: one recipe after another; during a run something may happen to a file."""
    from accelerate.state import AcceleratorState

    from shardstep.trainer import finish, loop

    finish.leave_world = lambda accelerator: None  # the world goes on to the next recipe
    function, outcomes = loop.train_step, []
    for recipe, happening in zip(recipes, damages, strict=True):

        def step(run: Any, batch: Any, happening: Any = happening) -> Any:
            if happening and run.state.progress.step == DAMAGED_AT:
                damage, path, other = happening
                damage(path, other)
            return function(run, batch)

        loop.train_step = step
        AcceleratorState._reset_state()
        outcomes.append(failure_of(recipe))
    return outcomes


def assert_same(run: Path, undisturbed: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes(), run
    assert [line["loss"] for line in train_lines(run)] == [line["loss"] for line in train_lines(undisturbed)], run


def test_damage_to_a_shard_is_reported_and_the_fixed_run_resumes(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    cases = [
        (split, damage) for split in ("train", "test") for damage in (truncate, flip, forge, remove, swap, replace)
    ]
    folders = [tmp_path / f"{damage.__name__} {split}" for split, damage in cases]
    sections = SECTIONS | {"checkpoint": {"every": "2 steps"}}
    recipes = [str(write_recipe(folder, shutil.copytree(shards, folder / "shards"), **sections)) for folder in folders]
    names = {"train": last_shard(shards), "test": "test-000001.tar"}
    damages = [
        (damage, folder / "shards" / split / names[split], folder / "shards" / split / f"{split}-000000.tar")
        for (split, damage), folder in zip(cases, folders, strict=True)
    ]
    (outcomes,) = run_ranks(1, train_each, recipes, damages)
    whole = [line["loss"] for line in train_lines(undisturbed)]
    for (code, _, message), (damage, path, other), folder in zip(outcomes, damages, folders, strict=True):
        assert code == 2, (folder, message)
        first_line = message.splitlines()[0]
        assert first_line.startswith("error: "), (folder, message)
        assert str(path) in first_line or (damage is swap and str(other) in first_line), (folder, message)
        assert "Traceback" not in message
        losses = [line["loss"] for line in train_lines(folder / "run")]
        assert losses == whole[: len(losses)], folder  # what was learnt until then was right
        newest, passed_over = checkpoint_files.newest_intact(folder / "run" / "checkpoints")
        assert newest is not None
        assert not passed_over
        shutil.rmtree(folder / "shards")
        shutil.copytree(shards, folder / "shards")
    (outcomes,) = run_ranks(1, train_each, recipes, [None] * len(recipes))
    for (code, _, message), folder in zip(outcomes, folders, strict=True):
        assert code == 0, (folder, message)
        assert_same(folder / "run", undisturbed)


def test_index_and_manifest_are_needed_at_the_start_only(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """A run that has read them finishes correctly; the next start reports the file, or the shards that it does not fit."""
    cases = [
        (split, name, damage)
        for split in ("train", "test")
        for name in ("index", "manifest.json")
        for damage in (truncate, flip, remove, swap)
    ]
    folders = [tmp_path / f"{damage.__name__} {split} {name}" for split, name, damage in cases]
    recipes = [str(write_recipe(folder, shutil.copytree(shards, folder / "shards"), **SECTIONS)) for folder in folders]
    other_of = {"train": "test", "test": "train"}
    damages = [
        (damage, folder / "shards" / split / name, folder / "shards" / other_of[split] / name)
        for (split, name, damage), folder in zip(cases, folders, strict=True)
    ]
    (outcomes,) = run_ranks(1, train_each, recipes, damages)
    (later,) = run_ranks(1, train_each, recipes, [None] * len(recipes))
    for outcome, again, (_, name, damage), folder in zip(outcomes, later, cases, folders, strict=True):
        assert (outcome[0], outcome[2]) == (0, ""), folder
        assert_same(folder / "run", undisturbed)
        code, _, message = again
        assert code == 2, folder
        assert str(folder / "shards") in message
        if name == "index" or damage in (truncate, flip, remove):
            assert name in message, (folder, message)
        else:  # a whole manifest, of other shards
            assert "does not match its manifest" in message, (folder, message)
