"""What a run on a GPU says of itself: where its time went, its profile, its memory; and the doctor's checks of a GPU."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from tests.distributed import run_command, run_ranks
from tests.gpu.test_training_on_a_gpu import CONVOLUTIONS, recipe_for, train
from tests.runs import train_lines
from tests.trainer.distributed.test_gradients import build_run

pytestmark = pytest.mark.gpu


def timed(recipe: str) -> tuple[int, dict[str, float]]:
    """Runs in a rank: how many steps events have timed, and the seconds by activity."""
    from shardstep.trainer import loop
    from shardstep.trainer.distributed.world import synchronize_device

    run = build_run(recipe)
    batches = run.batches.from_position(0, 0)
    for _ in range(70):
        batch = next(batches)
        run.timer.begin_step()
        loop.train_step(run, batch)
    synchronize_device(run.accelerator.device)
    run.timer.begin_step()  # reads the events of the last sampled step
    return run.timer._sampled, run.timer.time_s(0.0, 0.0, None)


def test_events_time_the_parts_of_a_step(device: str, shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(device, tmp_path, shards, {"duration": "70 steps"}, model=CONVOLUTIONS)
    ((sampled, time_s),) = run_ranks(1, timed, str(recipe))
    assert sampled == (2 if device == "cuda" else 0)  # steps 11 and 61; a CPU's clock times every step
    assert all(time_s[name] > 0 for name in ("forward", "backward", "optimizer"))
    assert sum(time_s.values()) == pytest.approx(2 * time_s["total"], abs=0.01)  # the total, and its parts


def test_the_time_table_and_the_memory_are_printed(device: str, shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(device, tmp_path, shards, {"duration": "20 steps"}, model=CONVOLUTIONS)
    printed = train(recipe)
    assert " s went\n" in printed
    assert all(name in printed for name in ("  forward  ", "  backward  "))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    assert f"1 rank, {name}" in printed
    line = train_lines(tmp_path / "run")[-1]
    assert 0 < line["memory_mb"] < 64_000
    start = json.loads((tmp_path / "run" / "starts.json").read_text())[0]
    assert (start["hardware"].get("gpu") or "cpu") == name


def test_a_profile_has_the_kernels_and_the_memory(device: str, shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(device, tmp_path, shards, {"duration": "6 steps"}, model=CONVOLUTIONS)
    train(recipe, "train.profile=steps 3-4")
    folder = tmp_path / "run" / "profile"
    operations = (folder / "operations-rank0.txt").read_text()
    assert "aten::convolution" in operations
    events = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert bool(kernels) == (device == "cuda")
    if device == "cpu":
        assert "CPU Mem" in (folder / "memory-rank0.txt").read_text()
        return
    assert "CUDA total" in operations
    with (folder / "memory-rank0.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    assert snapshot["segments"]
    assert any(trace for trace in snapshot["device_traces"])


def test_the_doctor_finds_nothing_wrong(device: str, shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(device, tmp_path, shards, model=CONVOLUTIONS)
    result = run_command("doctor", str(recipe), "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(json.loads(result.stdout)["facts"]["gpus"]) == torch.cuda.device_count()
