"""`shardstep same`: one and two ranks train alike, and a planted difference is found at its step."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.launch.same import _reasons, _rounding, compare, main
from tests.distributed import run_command
from tests.runs import read_lines, train_ranks, write_recipe


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 8 steps on 1 and 2 ranks. Read only."""
    folders = {}
    for ranks in (1, 2):
        place = tmp_path_factory.mktemp(f"ranks{ranks}")
        train_ranks(ranks, write_recipe(place, shards), "log.grad_norm=true")
        folders[ranks] = place / "run"
    return folders


def test_one_and_two_ranks(runs: dict[int, Path]) -> None:
    gap = compare(runs[1], runs[2], tolerance=1e-5)
    assert gap.differs_at is None
    assert 0 < gap.largest < 1e-5  # sums in another order
    assert compare(runs[1], runs[1], tolerance=1e-5).largest == 0


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run whose train lines are changed."""
    lines = read_lines(run / "metrics.jsonl")
    for line in lines:
        if line["kind"] == "train":
            change(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file(load_file(run / "model.safetensors"), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_planted_difference_is_found_at_its_step(key: str, runs: dict[int, Path], tmp_path: Path) -> None:
    def plant(line: dict[str, Any]) -> None:
        line[key] *= {5: 1 + 1e-4, 7: 1 + 3e-4}.get(line["step"], 1)

    gap = compare(runs[1], changed(runs[2], tmp_path, plant), tolerance=1e-5)
    assert gap.differs_at == 5
    assert getattr(gap, key) == pytest.approx(3e-4, rel=0.1)


def test_what_is_missing_is_a_difference(runs: dict[int, Path], tmp_path: Path) -> None:
    def plant(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            line["loss"] = None

    gap = compare(runs[1], changed(runs[2], tmp_path, plant), tolerance=1e-5)
    assert (gap.loss, gap.differs_at) == (math.inf, 3)


def test_weights_are_compared(runs: dict[int, Path], tmp_path: Path) -> None:
    folder = changed(runs[1], tmp_path, lambda line: None)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] *= 1.001
    save_file(weights, folder / "model.safetensors")
    gap = compare(runs[1], folder, tolerance=1e-5)
    assert (gap.loss, gap.differs_at) == (0, None)
    assert gap.weights == pytest.approx(1e-3, rel=1e-2)


def test_dropout_is_reported_as_the_reason(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, model={"name": "convnet"}))
    result = run_command("same", recipe, "--ranks", "1,2", "--steps", "3", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "2 ranks differ by more than 1e-05" in result.stdout
    assert all(f"model.{name}=0" in result.stdout for name in ("dropout", "feature_dropout"))
    row = next(line for line in result.stdout.splitlines() if line.startswith("2 "))
    assert row.split()[-1] == "1"  # from the first step on


def test_reasons_of_a_device_are_not_those_of_ranks(finished_run: Path) -> None:
    assert [text.split()[0] for text in _reasons(finished_run, by_device=True)] == ["convolutions"]
    assert [text.split()[0] for text in _reasons(finished_run, by_device=False)] == ["batch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu compares a CPU with a GPU that is there")
def test_a_device_that_is_not_here(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    with pytest.raises(InputError, match="on cuda: train.device=cuda, but torch finds no CUDA device here"):
        main([recipe, "--devices", "cuda,cpu", "--steps", "1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1"], "must be two or more different numbers"),
        (["--ranks", "1,two"], "must be two or more different numbers"),
        (["--ranks", "0,1", "--steps", "0", "--tolerance", "0"], "3 problems"),
        (["--devices", "cpu,gpu"], "--devices 'cpu,gpu' must be cpu and cuda"),
        (["--devices", "cuda"], "must be cpu and cuda"),
        (["--devices", "cpu,cuda,cpu"], "must be cpu and cuda"),
        (["--devices", "cpu,cuda", "--ranks", "1,2"], "must be a single number from 1, because --devices"),
        (["optimizer.lrr=1"], "optimizer.lrr"),
    ],
)
def test_bad_input(options: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises((InputError, TrainingFailed), match=message):
        main([str(write_recipe(tmp_path, shards)), *options])


BATCH_NORM = {"name": "whitening_cnn", "widths": [8], "sync_batch_norm": True}


def test_bf16_is_held_to_what_bf16_can_do(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, model=BATCH_NORM))
    result = run_command("same", recipe, "train.precision=bf16", "--ranks", "1,2", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same on 1, 2 ranks, to 0.2" in result.stdout
    assert "bf16 rounds the weight gradients of each rank's part of a batch: they are 2e-3 apart" in result.stdout


@pytest.mark.parametrize(
    ("precision", "model", "reasons"),
    [
        ("fp32", {"name": "mlp"}, []),
        ("bf16", {"name": "mlp"}, []),
        ("fp32", BATCH_NORM, ["batch norm over all ranks sums its statistics in another order"]),
        ("bf16", BATCH_NORM, []),
        ("fp16", BATCH_NORM, []),
        ("bf16", BATCH_NORM | {"sync_batch_norm": False}, ["batch norm normalises over each rank's samples"]),
        ("bf16", BATCH_NORM | {"dropout": 0.1}, ["each rank draws a different dropout mask"]),
    ],
)
def test_reasons_beside_rounding(precision: str, model: dict[str, Any], reasons: list[str], tmp_path: Path) -> None:
    config = {"model": model, "train": {"precision": precision}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    has_statistics = model["name"] == "whitening_cnn"
    save_file({"norm.running_mean" if has_statistics else "weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    found = _reasons(tmp_path, by_device=False)
    assert [text[: len(start)] for text, start in zip(found, reasons, strict=True)] == reasons
    assert [text.split()[0] for text in _rounding(tmp_path)] == ([] if precision == "fp32" else [precision])
