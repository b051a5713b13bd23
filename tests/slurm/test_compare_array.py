"""`shardstep compare --slurm`: a job array of the runs that are missing; no Slurm is needed to see its script."""

import sys
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.launch.compare import main
from tests.slurm.test_submit import check_golden

OPTIONS = ["smoke", "train.duration=2 steps", "--over", "optimizer.name=sgd,adam", "--seeds", "2", "--out", "out"]


def script(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([*OPTIONS, *options, "--slurm", "--time 60 --partition gpu --array 0-3%2 --dry-run"]) == 0
    return capsys.readouterr().out


def test_script_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_golden(
        "compare", script(capsys).replace(str(tmp_path), "/home/ada").replace(sys.executable, "/env/bin/python")
    )


def test_the_search_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = script(capsys, "--tune", "optimizer.lr", "--trials", "2")
    assert "run.dir=out/adam/rate-0.01" in tuned
    assert "run.dir=out/adam/0" not in tuned


def test_what_submit_refuses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["--slurm=--dry-run"], "--time is required"),
        (["--slurm", "--time 60 --over run.seed=0,1"], "--over belongs to the comparison"),
        (["--slurm", "--time 60 --partion gpu"], "did you mean --partition"),
        (["--slurm", "--time 60", "--parallel", "2"], "--parallel and --within have no effect with --slurm"),
    ):
        with pytest.raises(InputError, match=message):
            main([*OPTIONS, *options])
