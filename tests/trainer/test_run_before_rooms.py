"""A run that an earlier version of the code started resumes with this one: tests/fixtures/run_before_rooms.

`stopped/` was killed after step 7 of 16 on two ranks and has a checkpoint of step 6; `finished/` is the same run at its end.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardstep.trainer.run_dir import RunDir
from tests.conftest import ROOT
from tests.runs import train_ranks

FIXTURE = ROOT / "tests" / "fixtures" / "run_before_rooms"
CHECKPOINT = "checkpoints/step-00000006/model.safetensors"


def same_bits(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, data = FIXTURE / "recipe.yaml", "data.source=synthetic:101"
    shutil.copytree(FIXTURE / "stopped", "stopped")
    train_ranks(2, recipe, "run.dir=whole", "checkpoint.keep=9", data)
    train_ranks(2, recipe, "run.dir=stopped", data)
    resumed, whole = Path("stopped"), Path("whole")
    assert RunDir(resumed).state() == "finished"
    assert len(RunDir(resumed).starts) == 2
    assert [RunDir(run).config.recipe.data.order_version for run in (resumed, whole)] == [1, 2]  # it was begun with 1
    assert [RunDir(run).config.recipe.data.crop_version for run in (resumed, whole)] == [1, 2]
    losses, before = ([line["loss"] for line in RunDir(run).metrics()] for run in (resumed, FIXTURE / "finished"))
    assert len(losses) == 16 + 4  # steps and evaluations
    assert losses == pytest.approx(before, rel=1e-4)
    # Another processor may round otherwise, in the steps before the checkpoint, too: then there is no bitwise to ask for.
    if same_bits(whole / CHECKPOINT, FIXTURE / "stopped" / CHECKPOINT):
        assert same_bits(resumed / "model.safetensors", whole / "model.safetensors")
        assert same_bits(resumed / "model.safetensors", FIXTURE / "finished" / "model.safetensors")


def test_its_folders_are_read() -> None:
    finished, killed = RunDir(FIXTURE / "finished"), RunDir(FIXTURE / "stopped")
    assert finished.state() == "finished"
    assert finished.summary["step"] == json.loads((FIXTURE / "finished" / "summary.json").read_text())["step"] == 16
    assert killed.summary["reason"] == "Killed: "
    assert [path.name for path in killed.checkpoints] == ["step-00000006"]
    assert [line["step"] for line in killed.metrics() if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
