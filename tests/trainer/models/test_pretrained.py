"""Weights that were trained elsewhere: every kind of file, what fits of them, and what is said of the rest."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.trainer.models import build_model
from shardstep.trainer.models.pretrained import Fit, fit_weights, read_weights_file
from tests.distributed import run_ranks
from tests.runs import failure_of, train_lines, train_ranks, write_recipe

State = dict[str, Tensor]


def net(channels: int = 3, classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, classes))


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


KINDS: dict[str, Callable[[State, Path], Any]] = {
    "state_dict": lambda state, path: torch.save(state, path),
    "safetensors": lambda state, path: save_file(state, path.with_suffix(".safetensors")),
    "a training script's checkpoint": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "another one's": lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
    "of DDP": lambda state, path: torch.save(renamed(state, "module."), path),
    "compiled, in DDP": lambda state, path: torch.save({"state_dict": renamed(state, "module._orig_mod.")}, path),
    "of Lightning": lambda state, path: torch.save({"state_dict": renamed(state, "model.")}, path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(kind: str, tmp_path: Path) -> None:
    donor, model, path = net(), net(), tmp_path / "weights.pth"
    KINDS[kind](donor.state_dict(), path)
    fit = fit_weights(model, read_weights_file(next(tmp_path.iterdir())), 5, "it")
    assert fit == Fit(9, [], [], [], [])
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in model.state_dict().items())


MISFITS: dict[str, tuple[nn.Module, Callable[[State], State], Fit]] = {
    "other classes": (net(classes=2), lambda state: state, Fit(7, ["3.weight", "3.bias"], [], [], [])),
    "one channel": (net(channels=1), lambda state: state, Fit(9, [], [], [], [])),
    "no counts of batches": (
        net(), lambda state: {name: state[name] for name in state if "tracked" not in name}, Fit(8, [], [], [], []),
    ),
    "less": (net(), lambda state: {name: state[name] for name in state if name != "0.bias"}, Fit(8, [], ["0.bias"], [], [])),
    "more": (net(), lambda state: state | {"aux.weight": torch.ones(2)}, Fit(9, [], [], [], ["aux.weight"])),
    "another shape": (
        net(),
        lambda state: state | {"0.weight": torch.ones(4, 3, 5, 5)},
        Fit(8, [], [], ["0.weight 4x3x5x5 for 4x3x3x3"], []),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed_and_stays_as_it_was(case: str) -> None:
    model, change, expected = MISFITS[case]
    before, given = copy.deepcopy(model.state_dict()), change(net().state_dict())
    assert fit_weights(model, given, len(model[3].bias), "it") == expected
    kept = {*expected.head, *expected.missing, *(text.split()[0] for text in expected.reshaped)}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not changed & kept
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"} - kept


@pytest.mark.parametrize(("channels", "donors"), [(1, 3), (3, 1)])
def test_another_number_of_channels_gives_the_same_for_grey_images(channels: int, donors: int) -> None:
    donor, model = net(donors), net(channels)
    fit_weights(model, donor.state_dict(), 5, "it")
    grey = torch.randn(2, 1, 6, 6)
    one, other = (each.eval()(grey.expand(-1, count, -1, -1)) for each, count in ((donor, donors), (model, channels)))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("content", "message"), [
    (None, "there is no such file"),
    (b"not weights", "cannot be read as weights"),
    (b"", "cannot be read as weights"),
    ([1, 2], "does not hold a mapping of names to tensors"),
    ({}, "does not hold a mapping of names to tensors"),
    ({"epoch": 3}, "does not hold a mapping of names to tensors"),
])  # fmt: skip
def test_files_without_weights(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_weights_file(path)


def test_weights_of_another_model_are_refused() -> None:
    other = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 5))
    with pytest.raises(InputError, match="it holds weights of another model: not there.*there, but not in this model"):
        fit_weights(net(), {f"body.{name}": value for name, value in other.state_dict().items()}, 5, "it")


# --- in a run ------------------------------------------------------------------------------------------------------------


def first_loss(folder: Path) -> float:
    return train_lines(folder)[0]["loss"]


@pytest.mark.parametrize("average", [None, {"name": "ema", "decay": 0.5}])
def test_a_run_begins_with_the_weights_of_another(shards: Path, tmp_path: Path, average: dict | None) -> None:
    """A folder of a run, of its last checkpoint, and the file of its weights: the same beginning, on one rank and on two."""
    sections = {"model": {"name": "whitening_cnn", "widths": [4]}, **({"average": average} if average else {})}
    donor = write_recipe(tmp_path / "donor", shards, **sections)
    train_ranks(1, donor)
    run = tmp_path / "donor" / "run"
    places = {
        "run": run, "checkpoint": max((run / "checkpoints").iterdir()), "file": run / "model.safetensors",
    }  # fmt: skip
    losses = {}
    for name, place in places.items():
        model = {"name": "whitening_cnn", "widths": [4], "sync_batch_norm": True, "pretrained": str(place)}
        recipe = write_recipe(tmp_path / name, shards, model=model, train={"duration": "1 steps"})
        train_ranks(1 if name == "run" else 2, recipe)
        losses[name] = first_loss(tmp_path / name / "run")
    assert losses["run"] == pytest.approx(losses["file"], rel=1e-5)
    assert losses["run"] == pytest.approx(losses["checkpoint"], rel=1e-5)
    assert losses["run"] < first_loss(run) - 0.01


def test_a_resume_reads_them_no_more(shards: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(9)
    section = {"name": "mlp", "hidden": [16], "sync_batch_norm": False}
    save_file(build_model(section, (3, 32, 32), 10).state_dict(), weights)
    model = {"name": "mlp", "hidden": [16], "pretrained": str(weights)}
    recipe = write_recipe(tmp_path, shards, model=model, train={"duration": "2 steps"})
    train_ranks(1, recipe)
    weights.unlink()
    train_ranks(1, recipe, "train.duration=3 steps", "run.allow_changes=[train.duration]")
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("given", "message"), [
    ("true", "there are no weights of mlp to download; give a folder or a file"),
    ("''", "model.pretrained is empty"),
    ("none.pth", "there is no such file"),
    (".", "is neither a run's folder nor a checkpoint of one"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(shards: Path, tmp_path: Path, given: str, message: str) -> None:
    recipe = write_recipe(tmp_path, shards)
    found = run_ranks(2, failure_of, str(recipe), f"model.pretrained={given}")
    assert [code for code, _, _ in found] == [2, 2]
    assert [message in errors for _, _, errors in found] == [True, False]
    assert not any("Traceback" in errors for _, _, errors in found)
