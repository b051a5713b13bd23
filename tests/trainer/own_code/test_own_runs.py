"""Runs whose model, loss, transform, optimizer, schedule and average are the user's: ranks, kills, resumes, what is kept."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardstep.trainer.checkpoints.lock import LOCK_NAME
from tests.distributed import run_command, run_ranks
from tests.kill_drill import Moment, drill
from tests.own_code import AUGMENT, OWN, write_code, write_own_recipe
from tests.runs import failure_of, read_lines, train_lines, train_ranks, train_until
from tests.trainer.test_selection import consumed

LOG = {"every": "1 steps", "sample_keys": True}
EVERY_STEP = "checkpoint.every=1 steps"
NO_DROPOUT = {"model": OWN["model"] | {"dropout": 0.0}}
LONG = {"train": {"duration": "7 epochs"}}  # of 4 steps: 28


def weights(folder: Path) -> bytes:
    return (folder / "run" / "model.safetensors").read_bytes()


def test_any_number_of_ranks_has_the_same_curve(shards: Path, tmp_path: Path) -> None:
    """Batch norm over all ranks, without dropout: to 1e-3, as networks of ours."""
    curves, keys = {}, {}
    for ranks in (1, 2, 3, 4):
        recipe = write_own_recipe(tmp_path / str(ranks), shards, log=LOG, **NO_DROPOUT, **LONG)
        train_ranks(ranks, recipe)
        run = tmp_path / str(ranks) / "run"
        curves[ranks], keys[ranks] = [line["loss"] for line in train_lines(run)], consumed(run)
    assert len(curves[1]) == 28
    for ranks in (2, 3, 4):
        assert curves[ranks] == pytest.approx(curves[1], rel=1e-3), ranks
        assert keys[ranks] == keys[1], ranks
    assert curves[1][-1] < curves[1][0] - 0.1  # it learns


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_bitwise(ranks: int, shards: Path, tmp_path: Path) -> None:
    """With dropout, momentum, a transform that draws and an average: all of it survives."""
    whole, killed = (write_own_recipe(tmp_path / name, shards) for name in ("whole", "killed"))
    train_ranks(ranks, whole)
    run_ranks(ranks, train_until, str(killed), 3, EVERY_STEP)
    train_ranks(ranks, killed)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_two_then_three_then_one_rank_see_each_sample_once(shards: Path, tmp_path: Path) -> None:
    whole, changing = (
        write_own_recipe(tmp_path / name, shards, log=LOG, **NO_DROPOUT) for name in ("whole", "changing")
    )
    train_ranks(1, whole)
    run_ranks(2, train_until, str(changing), 2, EVERY_STEP)
    run_ranks(3, train_until, str(changing), 5, EVERY_STEP)
    train_ranks(1, changing)
    one, other = tmp_path / "whole" / "run", tmp_path / "changing" / "run"
    assert consumed(other) == consumed(one)
    assert len({(epoch, key) for epoch, _, _, key in consumed(other)}) == 2 * 101
    losses = [[line["loss"] for line in train_lines(run)] for run in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.drill
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_kills_at_any_moment(ranks: int, shards: Path, tmp_path: Path) -> None:
    moments = [Moment(operation=number) for number in (3, 11, 24)] + [Moment(share=share) for share in (0.2, 0.35)]
    sections = OWN | {
        "data": {"augment": AUGMENT},
        "checkpoint": {"every": "3 steps"},
        "train": {"duration": "6 epochs"},
    }
    for name in ("whole", "killed"):
        write_code(tmp_path / name)
    assert drill(tmp_path, shards, ranks, moments, sections).total() >= 3


VIEWS = """
    from torch import nn

    class Flat(nn.Module):
        def __init__(self, channels, num_classes):
            super().__init__()
            self.filters = nn.Conv2d(channels, 8, 3)
            self.norm = nn.BatchNorm1d(8 * 30 * 30)
            self.head = nn.Linear(8 * 30 * 30, num_classes)

        def forward(self, images):
            features = self.filters(images)
            return self.head(self.norm(features.view(features.size(0), -1)))

    def net(image_shape, num_classes):
        return Flat(image_shape[0], num_classes)
"""


def test_a_model_that_takes_no_channels_last_is_trained_without(shards: Path, tmp_path: Path) -> None:
    """As with `view`, which most networks have."""
    train = {"precision": "auto", "memory_format": "auto", "duration": "2 steps"}
    recipe = write_own_recipe(tmp_path, shards, model={"name": "flat.py:net"}, train=train)
    write_code(tmp_path, flat=VIEWS)
    ((code, out, err),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0, err
    assert "flat.py:net does not work in fp32 channels_last: view size is not compatible" in out + err
    assert ", contiguous" in out
    for command in ("evaluate", "report"):
        result = run_command(command, "run", "--device", "cpu", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "left out" not in result.stdout
    ((code, _, err),) = run_ranks(
        1, failure_of, str(recipe), "train.memory_format=channels_last", f"run.dir={tmp_path / 'r'}"
    )
    assert code == 1
    assert "Flat(" in err.splitlines()[-5]


# --- what a run keeps ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe with its code and its finished run. Read only."""
    folder = tmp_path_factory.mktemp("own")
    train_ranks(1, write_own_recipe(folder, shards), "train.duration=3 steps", EVERY_STEP)
    return folder


def test_a_run_keeps_its_code(own_run: Path) -> None:
    kept = json.loads((own_run / "run" / "code.json").read_text())
    used = {"blocks.py", "net.py", "transform.py", "loss.py", "optim.py", "schedule.py", "average.py"}
    assert set(kept["files"]) == {path.name for path in (own_run / "run" / "code").iterdir()} == used
    for name, digest in kept["files"].items():
        assert (own_run / "run" / "code" / name).read_bytes() == (own_run / name).read_bytes()
        assert hashlib.sha256((own_run / name).read_bytes()).hexdigest() == digest
    for config in (own_run / "run").glob("**/*.yaml"):
        assert "code/net.py:net" in config.read_text()
        assert str(own_run) + "/net.py" not in config.read_text()


def test_a_run_keeps_the_version_of_an_installed_package(shards: Path, tmp_path: Path) -> None:
    import torch

    optimizer = {"name": "torch.optim:SGD", "lr": 0.1}
    model = {"name": "shardstep.trainer.models.mlp:mlp", "hidden": [8]}
    recipe = write_own_recipe(tmp_path, shards, model=model, optimizer=optimizer)
    train_ranks(1, recipe, "train.duration=1 steps")
    packages = json.loads((tmp_path / "run" / "code.json").read_text())["packages"]
    assert packages["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert "shardstep" in packages
    record = tmp_path / "run" / "code.json"
    record.write_text(record.read_text().replace(packages["torch"], "1.0"))
    code, _, err = run_ranks(1, failure_of, str(recipe), "train.duration=1 steps")[0]
    assert code == 2
    assert f"code: torch (1.0) -> torch ({packages['torch']})" in err


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_NAME}


def append(folder: Path, name: str, text: str = "\n# changed\n") -> None:
    path = folder / name
    path.write_text(path.read_text() + text)


CHANGES: list[tuple[Callable[[Path], None], str | None]] = [
    (lambda folder: None, None),
    (lambda folder: append(folder, "net.py"), "code: net.py (sha256"),
    (lambda folder: append(folder, "blocks.py"), "code: blocks.py (sha256"),
    (lambda folder: append(folder, "optim.py"), "code: optim.py (sha256"),
    (lambda folder: append(folder, "images.py"), None),  # nothing of the recipe is in it
    (lambda folder: [append(folder, name) for name in ("loss.py", "transform.py")] and None, "code: loss.py (sha256"),
    (lambda folder: append(folder, "net.py", "\nimport images\n"), "code: net.py (sha256"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_resume_with_other_code_is_refused(
    change: Callable[[Path], None], message: str | None, own_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"  # to another folder, which does not matter
    shutil.copytree(own_run, folder)
    change(folder)
    before = contents(folder / "run")
    words = [str(folder / "recipe.yaml"), f"run.dir={folder / 'run'}", "train.duration=4 steps"]
    code, _, err = run_ranks(1, failure_of, *words, "run.allow_changes=[train.duration]")[0]
    assert code == (2 if message else 0), err
    if message is None:
        return
    assert message in err
    assert "run.allow_changes=[train.duration,code]" in err
    assert contents(folder / "run") == before
    code, _, err = run_ranks(1, failure_of, *words, "run.allow_changes=[train.duration,code]")[0]
    assert code == 0, err
    kept = json.loads((folder / "run" / "code.json").read_text())["files"]
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in kept.items())


def test_a_run_goes_on_from_its_own_folder(own_run: Path, tmp_path: Path) -> None:
    """Where the code that it was started with is gone."""
    shutil.copytree(own_run / "run", tmp_path / "run")
    words = [str(tmp_path / "run" / "config.yaml"), f"run.dir={tmp_path / 'run'}", "train.duration=4 steps"]
    code, _, err = run_ranks(1, failure_of, *words, "run.allow_changes=[train.duration]")[0]
    assert code == 0, err
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4
    assert (tmp_path / "run" / "code" / "net.py").is_file()


def test_code_of_two_folders_is_kept_apart(shards: Path, tmp_path: Path) -> None:
    write_code(tmp_path / "a")
    write_code(tmp_path / "b", blocks="word = 1\n", loss="import blocks\nfrom net import tempered\n", net="""
        import blocks
        from torch.nn import functional

        assert blocks.word == 1

        def tempered(outputs, labels):
            return functional.cross_entropy(outputs, labels, reduction="none")
    """)  # fmt: skip
    sections: dict[str, Any] = {"model": {"name": "../a/net.py:net"}, "loss": {"name": "../b/loss.py:tempered"}}
    plain = {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}, "average": {"name": "none"}}
    recipe = write_own_recipe(tmp_path / "c", shards, data={"augment": []}, **sections, **plain)
    train_ranks(1, recipe, "train.duration=2 steps")
    run = tmp_path / "c" / "run"
    kept = {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*.py")}
    assert kept == {"net.py", "blocks.py", "2/loss.py", "2/net.py", "2/blocks.py"}
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    result = run_command("evaluate", str(run), "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["samples"] == 53


def train_from(recipes: list[str]) -> tuple[int, str, str]:
    import os

    return failure_of(recipes[int(os.environ["RANK"])])


@pytest.mark.parametrize("changed", ["net.py", "blocks.py"])
def test_ranks_with_other_code_are_refused(changed: str, shards: Path, tmp_path: Path) -> None:
    recipes = [write_own_recipe(tmp_path / name, shards, run={"dir": str(tmp_path / "run")}) for name in ("one", "two")]
    append(tmp_path / "two", changed)
    results = run_ranks(2, train_from, [str(path) for path in recipes])
    assert [code for code, _, _ in results] == [2, 2]
    assert f"rank 1: this rank has other code than rank 0: {changed} (sha256" in results[0][2]
    assert not (tmp_path / "run").exists()


def test_ranks_with_the_same_code_in_other_folders_train(shards: Path, tmp_path: Path) -> None:
    recipes = [write_own_recipe(tmp_path / name, shards, run={"dir": str(tmp_path / "run")}) for name in ("one", "two")]
    assert [code for code, _, _ in run_ranks(2, train_from, [str(path) for path in recipes])] == [0, 0]
