"""Images that cannot be decoded although their bytes are intact: the run stops, or all ranks skip the same ones."""

import hashlib
import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardstep.configs.errors import InputError
from shardstep.datasets.augment import Normalize, build_mixing, build_transforms
from shardstep.datasets.batches import TrainBatches, test_batches
from shardstep.datasets.framing import Framing, RandomResizedCrop
from shardstep.datasets.manifest import open_shards, write_manifest
from shardstep.datasets.order import EpochOrder, OrderConfig
from shardstep.datasets.parts import Part
from shardstep.datasets.reader import Reader, StreamReader
from shardstep.datasets.resident import load_resident
from shardstep.launch.evaluate import main as evaluate
from shardstep.launch.export import main as export
from shardstep.launch.report import main as report
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

CPU = torch.device("cpu")
AUGMENT = [{"name": "flip"}, {"name": "mixup"}]
BAD = [0, 17, 18, 60, 100]  # of 101: the first, two in a row, the last
TEST_BAD = [3, 52]  # of 53
test_batches.__test__ = False  # type: ignore[attr-defined]


def spoil(folder: Path, sample_ids: list[int]) -> None:
    """Replace images by bytes that are no image, as a set has that was indexed where they could be decoded."""
    shards = open_shards(folder)
    index, contents = shards.index.copy(), {}
    for sample in sample_ids:
        shard, block, size, _, _ = index[sample].item()
        content = contents.setdefault(shard, bytearray(shards.shard_path(shard).read_bytes()))
        content[block * 512 : block * 512 + size] = nonsense = b"?" * size
        index[sample]["crc32"] = zlib.crc32(nonsense)
    parts = list(shards.manifest.shards)
    for shard, content in contents.items():
        shards.shard_path(shard).write_bytes(content)
        parts[shard] = replace(parts[shard], sha256=hashlib.sha256(content).hexdigest())
    data = index.tobytes()
    manifest = replace(shards.manifest, shards=parts, index_sha256=hashlib.sha256(data).hexdigest())
    write_manifest(folder, manifest, data)


@pytest.fixture(scope="module")
def spoilt(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoilt")
    for split, bad in (("train", BAD), ("test", TEST_BAD)):
        shutil.copytree(shards / split, folder / split)
        spoil(folder / split, bad)
    return folder


def readers(folder: Path, framing: Framing | None = None) -> list[Reader]:
    opened = open_shards(folder)
    resident = [load_resident(opened, framing, CPU, None, "skip")] if not (framing and framing.random) else []
    return [StreamReader(opened, framing, None, "skip"), *resident]


def batches(folder: Path, reader: Reader, rank: int = 0, ranks: int = 1, ids: np.ndarray | None = None) -> TrainBatches:
    part = Part(open_shards(folder), ids)
    order = OrderConfig(part.samples_per_shard, 5, 1, None, ids=ids)
    return TrainBatches(
        reader, order, global_batch_size=30, samples_per_epoch=part.samples, rank=rank, part=part,
        world_size=ranks, max_micro_batch=7, device=CPU, workers=2, memory_format=torch.contiguous_format,
        transforms=build_transforms(AUGMENT), mixing=build_mixing(AUGMENT),
        normalize=Normalize([0.5] * 3, [0.25] * 3, (reader.image_shape), CPU),
    )  # fmt: skip


def epoch_of(made: TrainBatches, position: int = 0) -> list[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """The positions, ids and images of each step to the end of the first epoch."""
    found = []
    for batch in made.from_position(0, position):
        if batch.epoch:
            break
        micros = list(batch.micro_batches)
        columns = [np.concatenate([getattr(micro, name) for micro in micros]) for name in ("positions", "sample_ids")]
        found.append((*columns, torch.cat([micro.images for micro in micros])))
    return found  # type: ignore[return-value]


CROP = Framing(24, 24, (28, 28), 2, RandomResizedCrop(24))


@pytest.mark.parametrize("framing", [None, CROP])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_next_sample_takes_the_place_of_a_bad_one_on_any_number_of_ranks(
    spoilt: Path, held_out: bool, framing: Framing | None
) -> None:
    folder = spoilt / "train"
    ids = np.arange(1, 101, 2) if held_out else None  # bad among them: 17; its place takes 19, the next of these
    expected = {17: 19} if held_out else {0: 1, 17: 19, 18: 19, 60: 61, 100: 1}
    numbers = EpochOrder([17] * 5 + [16], 5, 0, 1, None).slice(0, 101) if ids is None else None
    for reader in readers(folder, framing):
        alone = batches(folder, reader, ids=ids)
        one = epoch_of(alone)
        seen = np.concatenate([ids_of for _, ids_of, _ in one])
        if numbers is not None:
            assert seen.tolist() == [expected.get(sample, sample) for sample in numbers.tolist()]
        else:
            assert sorted(seen.tolist()) == sorted(expected.get(sample, sample) for sample in range(1, 101, 2))
        assert len(alone.skipped) == len(expected)
        for ranks in (2, 3):
            shares = [batches(folder, reader, rank, ranks, ids) for rank in range(ranks)]
            for step, parts in enumerate(zip(*map(epoch_of, shares), strict=True)):
                for column in range(2):
                    assert np.array_equal(np.concatenate([part[column] for part in parts]), one[step][column])
                assert torch.equal(torch.cat([part[2] for part in parts]), one[step][2])
            assert sum(len(share.skipped) for share in shares) == len(expected)
        later = epoch_of(batches(folder, readers(folder, framing)[0], ids=ids), position=30)  # as after a resume
        assert all(torch.equal(again[2], before[2]) for again, before in zip(later, one[1:], strict=True))


def test_memory_and_stream_agree(spoilt: Path) -> None:
    found = [epoch_of(batches(spoilt / "train", reader)) for reader in readers(spoilt / "train")]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(*found, strict=True))
    again = load_resident(open_shards(spoilt / "train"), None, CPU, None, "skip")  # from the cache
    assert again.bad == set(BAD)
    with pytest.raises(InputError, match="not an image that can be decoded"):
        load_resident(open_shards(spoilt / "train"), None, CPU)  # never from what a run that skips has left there


def test_nothing_is_left(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "test", tmp_path / "test")
    spoil(tmp_path / "test", list(range(53)))
    for reader in readers(tmp_path / "test"):
        with pytest.raises(InputError, match="none of the training images can be decoded"):
            epoch_of(batches(tmp_path / "test", reader))


SECTIONS: dict[str, Any] = {
    "train": {"global_batch_size": 30, "duration": "2 epochs"},
    "checkpoint": {"every": "3 steps"},
    "eval": {"every": "1 epochs", "batch_size": 10},
}


def recipe(folder: Path, shards: Path, mode: str, on_bad_image: str = "skip") -> Path:
    return write_recipe(folder, shards, data={"mode": mode, "on_bad_image": on_bad_image}, **SECTIONS)


@pytest.mark.parametrize("mode", ["stream", "resident"])
def test_a_run_counts_them_the_same_on_any_number_of_ranks_and_after_a_resume(
    spoilt: Path, tmp_path: Path, mode: str
) -> None:
    for ranks in (1, 2):
        train_ranks(ranks, recipe(tmp_path / str(ranks), spoilt, mode))
    resumed = recipe(tmp_path / "resumed", spoilt, mode)
    train_ranks(2, resumed, "train.duration=5 steps")
    train_ranks(1, resumed, "run.allow_changes=[train.duration]")
    order = EpochOrder([17] * 5 + [16], 0, 0, 1, None).slice(0, 101).tolist()  # of the first epoch
    places = sorted((order.index(sample), sample) for sample in BAD)
    named = {
        "train": [{"epoch": 0, "position": place} | name_of(spoilt / "train", sample) for place, sample in places],
        "test": [name_of(spoilt / "test", sample) for sample in TEST_BAD],
    }
    for name in ("1", "2", "resumed"):
        run = tmp_path / name / "run"
        summary = json.loads((run / "summary.json").read_text())
        # five bad images in each of two epochs; 53 - 2 = 51 are evaluated
        assert summary["bad_images"] == {"train": 10, "test": 2}
        assert summary["first_bad_images"] == named
        lines = train_lines(run)
        assert lines[-1]["bad_images"] == 10
        assert [line["samples"] for line in lines if line["epoch"] == 1] == [101]
        evaluated = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
        assert [line["bad_images"] for line in evaluated if line["epoch"] in (1, 2)] == [2, 2]
        assert sum(share is not None for share in evaluated[-1]["per_class_accuracy"]) > 0
    losses = [train_lines(tmp_path / name / "run")[-1]["loss"] for name in ("1", "2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def name_of(folder: Path, sample: int) -> dict[str, str]:
    opened = open_shards(folder)
    return {"shard": str(opened.shard_path(int(opened.index[sample]["shard"]))), "key": opened.key(sample)}


def test_commands_leave_them_out_and_name_them(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((code, out, err),) = run_ranks(1, failure_of, str(recipe(tmp_path, spoilt, "stream")))
    bad = [name_of(spoilt / "test", sample) for sample in TEST_BAD]
    texts = ", ".join(f"{one['shard']}: sample {one['key']}" for one in bad)
    assert code == 0
    assert "warning: there are images that cannot be decoded, such as " in out + err
    assert f"left out: 2 test images that cannot be decoded: {texts}" in out
    assert "left out: the next image took the place of one that cannot be decoded, 10 times in training: " in out

    assert evaluate([str(tmp_path / "run")]) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    assert said == f"2 of 53 images cannot be decoded, and are left out: {texts}"
    found, summary = json.loads(last), json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (found["samples"], found["bad_images"]) == (51, 2)
    assert found["first_bad_images"] == bad
    assert found["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-5)

    assert export([str(tmp_path / "run"), "--format", "safetensors"]) == 0
    assert " on 51 images of " in capsys.readouterr().out
    assert report([str(tmp_path / "run")]) == 0
    assert f"left out: 2 test images that cannot be decoded: {texts}" in capsys.readouterr().out
    predictions = np.load(tmp_path / "run" / "predictions.npz")
    assert predictions["ids"].tolist() == sorted(set(range(53)) - set(TEST_BAD))


@pytest.mark.parametrize("mode", ["stream", "resident"])
def test_without_the_key_a_run_stops_and_says_which(spoilt: Path, tmp_path: Path, mode: str) -> None:
    ((code, _, err),) = run_ranks(1, failure_of, str(recipe(tmp_path, spoilt, mode, "stop")))
    assert code == 2
    assert "not an image that can be decoded" in err
    assert "data.on_bad_image=skip" in err


def test_a_run_without_bad_images_says_nothing_of_them(shards: Path, tmp_path: Path) -> None:
    train_ranks(1, recipe(tmp_path, shards, "stream"), "train.duration=4 steps")
    assert "bad_images" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"] == {"train": 0, "test": 0}
