"""`shardstep export`: the command around trainer/analysis/export_formats.py."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from shardstep.launch.cli import run as run_command
from shardstep.launch.export import main
from shardstep.trainer.analysis import export_formats as exporting


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_run_and_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--format", "safetensors"]) == 0
    told = capsys.readouterr().out
    checked = f"checked with torch {version('torch')}: loaded again, its outputs differ from the original's by at most"
    assert checked in told
    assert (run / "exported.safetensors").is_file()
    checkpoint = run / "checkpoints" / "step-00000004"
    floats = ["--format", "torch_export", "--pixels", "float32"]
    assert main([str(checkpoint), *floats, "--out", str(tmp_path / "a.pt2")]) == 0
    assert torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert (tmp_path / "a.pt2").is_file()
    assert len(list(checkpoint.iterdir())) == 5  # nothing is added to a checkpoint
    assert "is not finished" not in capsys.readouterr().out
    (run / "summary.json").unlink()
    assert main([str(run), "--format", "safetensors"]) == 0
    assert f"{run} is not finished: using its checkpoint step-00000008\n" in capsys.readouterr().out
    with safe_open(run / "exported.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["shardstep"])["weights"] == "the checkpoint step-00000008"


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--format", "safetensors"]
    assert run_command(main, [str(run), *weights, "--out", str(tmp_path / "a.pt2")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert run_command(main, [str(run), *weights, "--out", str(run / "model.safetensors")]) == 2
    assert "would overwrite the weights of the run" in capsys.readouterr().err
    assert run_command(main, [str(tmp_path), *weights]) == 2
    assert "is neither a run's folder nor a checkpoint" in capsys.readouterr().err
    content = yaml.safe_load((run / "config.yaml").read_text())
    test_set, content["data"]["test"] = content["data"]["test"], "nowhere"
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert run_command(main, [str(run), *weights]) == 2
    message = capsys.readouterr().err
    assert "no images to compare the exported model on, so it is not written: no shards in nowhere" in message
    assert message.count("\n") == 1
    assert run_command(main, [str(run), *weights, "--data", test_set]) == 0


def test_a_difference_is_a_failure(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    assert run_command(main, [str(run), "--format", "safetensors"]) == 1
    assert capsys.readouterr().err.startswith("failed: safetensors: loaded again, the outputs differ by up to")
    assert not (run / "exported.safetensors").exists()
