"""`shardstep bench scaling`: what it prints, what it refuses, and that docs/scaling.md shows the model's own figures."""

import json
from pathlib import Path

import pytest

from shardstep.launch.bench import main
from shardstep.launch.benchmarks.bench_scaling import COLUMNS, cells
from shardstep.launch.benchmarks.scaling_model import prediction_rows
from shardstep.launch.cli import run
from tests.conftest import ROOT
from tests.distributed import run_command


def test_a_prediction_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--predict-only", "--json", "--workload", "resnet50", "--gpus", "8,512"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(row["batch"], row["ranks"], row["images_per_rank"]) for row in found["predictions"]]
    assert rows == [("kept", 8, 32), ("growing", 8, 256), ("growing", 512, 256)]
    for row in found["predictions"]:
        assert row["step_s"] == row["compute_s"] + row["exposed_s"]


def test_ranks_without_an_image_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--predict-only", "--workload", "resnet50", "--gpus", "8,512"]) == 0
    assert "no prediction with a kept batch on 512 ranks: it has fewer images" in capsys.readouterr().out


@pytest.mark.parametrize("workload", ["record94_captured", "resnet50"])
def test_a_prediction_fits_80_columns(workload: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--predict-only", "--workload", workload, "--gpus", "1,8,512"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_bad_options_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cluster", "a10", "--workload", "resnet", "--gpus", "8,x", "--repeats", "0", "--batch", "1"]
    assert run(main, ["scaling", *options]) == 2
    message = capsys.readouterr().err
    for part in (
        "did you mean a100?",
        "did you mean resnet50?",
        "--gpus 8,x",
        "--repeats 0 must be at least 1",
        "--batch 1",
    ):
        assert part in message


@pytest.mark.drill
@pytest.mark.parametrize("all_reduce", ["buckets", "flat"])
def test_it_measures_this_machine(tmp_path: Path, all_reduce: str) -> None:
    options = ["--repeats", "1", "--steps", "1", "--batch", "7", "--all-reduce", all_reduce, "--json"]
    result = run_command("bench", "scaling", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["parts"]["gradient_bytes"] == 4 * 299_434  # of the article's net
    assert found["two_ranks"]["measured_step_s"] > 0
    assert found["two_ranks"]["predicted_step_s"] > 7 / 2 * found["parts"]["compute_s_per_image"]
    assert {len(rates) for rates in found["images_per_s"].values()} == {1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workload", ["record94", "record94_captured", "resnet50"])
def test_the_page_shows_what_the_model_says(workload: str) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    for row in [COLUMNS, *cells(prediction_rows(workload, "a100", [1, 8, 64, 512]))]:
        assert f"| {' | '.join(row)} |" in page, row
