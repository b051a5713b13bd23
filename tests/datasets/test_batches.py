"""Guarantee 1, second half: the same batches for any number of ranks and workers, from memory or from shards."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardstep.configs.errors import InputError
from shardstep.configs.schema import CropVersion
from shardstep.datasets.augment import Labels, MixedLabels, Normalize, build_mixing, build_transforms
from shardstep.datasets.batches import OrderConfig, TrainBatches, micro_pieces, read_ahead, test_batches
from shardstep.datasets.framing import DRAWS, Framing, RandomResizedCrop
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.order import EpochOrder
from shardstep.datasets.reader import Reader, StreamReader
from shardstep.datasets.resident import load_resident
from shardstep.datasets.rng import AT_DECODING, Draws
from shardstep.datasets.write import write_shards
from tests.photographs import write_photographs

CPU = torch.device("cpu")
test_batches.__test__ = False  # type: ignore[attr-defined] # a function of the product, not a test


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 40))
def test_pieces_cover_a_batch_once_and_are_as_many_on_every_rank(size: int, world_size: int, limit: int) -> None:
    by_rank = [micro_pieces(size, rank, world_size, limit) for rank in range(world_size)]
    assert len({len(pieces) for pieces in by_rank}) == 1
    covered = [place for pieces in by_rank for start, stop in pieces for place in range(start, stop)]
    assert covered == list(range(size))
    assert max(stop - start for pieces in by_rank for start, stop in pieces) <= limit


def test_pieces_by_hand() -> None:
    # 10 samples on 3 ranks, at most 2 each time: shares of 3, 3 and 4
    assert [micro_pieces(10, rank, 3, 2) for rank in range(3)] == [
        [(0, 2), (2, 3)],
        [(3, 5), (5, 6)],
        [(6, 8), (8, 10)],
    ]
    # 2 samples on 3 ranks: the first has none, and takes part with an empty batch
    assert [micro_pieces(2, rank, 3, 5) for rank in range(3)] == [[(0, 0)], [(0, 1)], [(1, 2)]]


AUGMENT = [{"name": "flip", "probability": 0.5}, {"name": "translate", "pixels": 3}]
MIXED = [
    *AUGMENT,
    {"name": "trivial_augment"},
    {"name": "mixup", "alpha": 0.5, "probability": 0.8},
    {"name": "cutmix", "alpha": 1.0, "probability": 1.0},
]


def batches(
    shards: Path,
    reader: Reader,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: int = 100,
    lanes: int = 1,
    window: int | None = None,
    augment: list[dict] = AUGMENT,
    size: int = 30,
) -> TrainBatches:
    opened = open_shards(shards / "train")
    return TrainBatches(
        reader,
        OrderConfig(opened.samples_per_shard, 5, lanes, window),
        global_batch_size=size,
        samples_per_epoch=101,
        rank=rank,
        world_size=world_size,
        max_micro_batch=limit,
        device=CPU,
        workers=workers,
        transforms=build_transforms(augment),
        mixing=build_mixing(augment),
        normalize=Normalize([0.5] * 3, [0.25] * 3, (32, 32, 3), CPU),
        memory_format=torch.contiguous_format,
    )


def collect(made: TrainBatches, steps: int, epoch: int = 0, position: int = 0) -> list[dict]:
    """Each step's samples of one rank, joined over its micro-steps."""
    found = []
    for batch in islice(made.from_position(epoch, position), steps):
        micros = list(batch.micro_batches)
        assert len(micros) == batch.num_micro_steps
        found.append(
            {
                "epoch": batch.epoch,
                "position": batch.position,
                "size": batch.size,
                "images": torch.cat([micro.images for micro in micros]),
                "labels": torch.cat([as_columns(micro.labels) for micro in micros]),
                "positions": np.concatenate([micro.positions for micro in micros]),
                "ids": np.concatenate([micro.sample_ids for micro in micros]),
            }
        )
    return found


def as_columns(labels: Labels) -> torch.Tensor:
    """Labels (batch,); of mixed images own and partners' labels and weights, (batch, 3)."""
    if isinstance(labels, MixedLabels):
        return torch.stack([labels.own.double(), labels.partners.double(), labels.weights.double()], dim=1)
    return labels


def joined(ranks: list[list[dict]], step: int, key: str) -> np.ndarray:
    return np.concatenate([np.asarray(rank[step][key]) for rank in ranks])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("workers", "limit"), [(0, 100), (2, 4)])
@pytest.mark.parametrize(("lanes", "window"), [(1, None), (3, 2)])
def test_any_world_sees_the_same(
    shards: Path, world_size: int, workers: int, limit: int, lanes: int, window: int | None
) -> None:
    reader = StreamReader(open_shards(shards / "train"))
    (one,) = [collect(batches(shards, reader, lanes=lanes, window=window), 9)]
    many = [
        collect(batches(shards, reader, rank, world_size, workers, limit, lanes, window), 9)
        for rank in range(world_size)
    ]
    assert [step["size"] for step in one] == [30, 30, 30, 11, 30, 30, 30, 11, 30]
    for step in range(9):
        order = EpochOrder([17] * 5 + [16], 5, one[step]["epoch"], lanes, window)
        start = one[step]["position"]
        assert joined(many, step, "ids").tolist() == order.slice(start, start + one[step]["size"]).tolist()
        for key in ("images", "labels", "positions"):
            assert np.array_equal(joined(many, step, key), np.asarray(one[step][key])), key


@pytest.mark.parametrize(("world_size", "limit"), [(1, 3), (1, 4), (2, 100), (2, 3), (3, 100), (3, 3), (8, 1)])
@pytest.mark.parametrize("size", [1, 7, 30])
def test_any_world_mixes_the_same(shards: Path, world_size: int, limit: int, size: int) -> None:
    # Of batches of 7, and of the last of 11, the last sample has no partner; shares and pieces begin within pairs.
    reader = load_resident(open_shards(shards / "train"), None, CPU)
    one = collect(batches(shards, reader, augment=MIXED, size=size), 9)
    many = [
        collect(batches(shards, reader, rank, world_size, limit=limit, augment=MIXED, size=size), 9)
        for rank in range(world_size)
    ]
    for step in range(9):
        for key in ("images", "labels", "positions", "ids"):
            assert np.array_equal(joined(many, step, key), np.asarray(one[step][key])), key
        partners = [min(place ^ 1, one[step]["size"] - 1) for place in range(one[step]["size"])]
        own, others, _ = one[step]["labels"].unbind(1)
        assert torch.equal(others, own[partners])


@pytest.mark.parametrize("augment", [AUGMENT, MIXED])
def test_resident_and_stream_give_the_same(shards: Path, augment: list[dict]) -> None:
    opened = open_shards(shards / "train")
    resident = collect(batches(shards, load_resident(opened, None, CPU), augment=augment), 6)
    stream = collect(batches(shards, StreamReader(opened), workers=2, augment=augment), 6)
    for one, other in zip(resident, stream, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("augment", [AUGMENT, MIXED])
def test_starting_anywhere_is_going_on(shards: Path, augment: list[dict]) -> None:
    reader = StreamReader(open_shards(shards / "train"))
    whole = collect(batches(shards, reader, augment=augment), 8)
    rest = collect(batches(shards, reader, augment=augment), 3, epoch=1, position=30)
    for late, early in zip(rest, whole[5:], strict=True):
        assert torch.equal(late["images"], early["images"])
        assert late["positions"].tolist() == early["positions"].tolist()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 101 JPEGs of several sizes and kinds, in train/."""
    folder = tmp_path_factory.mktemp("photographs")
    source = write_photographs(folder / "files", "train", 101)
    write_shards(str(source), "train", folder / "train", samples_per_shard=17)
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_random_crops_are_the_same_for_any_number_of_ranks_and_start(version: CropVersion, photographs: Path) -> None:
    framing = Framing(32, 32, (36, 36), version, RandomResizedCrop(32))
    reader = StreamReader(open_shards(photographs / "train"), framing)
    (one,) = [collect(batches(photographs, reader), 7)]
    many = [collect(batches(photographs, reader, rank, 3, workers=2, limit=4), 7) for rank in range(3)]
    for step in range(7):
        assert np.array_equal(joined(many, step, "ids"), one[step]["ids"])
        assert np.array_equal(joined(many, step, "images"), one[step]["images"])
    for late, early in zip(collect(batches(photographs, reader), 3, epoch=1, position=30), one[5:], strict=False):
        assert torch.equal(late["images"], early["images"])
    # another epoch, another part; the labels come along
    first, second = one[0]["ids"].tolist(), np.concatenate([step["ids"] for step in one[4:]]).tolist()
    again = next(sample for sample in first if sample in second)
    later = torch.cat([step["images"] for step in one[4:]])[second.index(again)]
    assert not torch.equal(one[0]["images"][first.index(again)], later)
    assert one[0]["labels"].tolist() == open_shards(photographs / "train").labels[one[0]["ids"]].tolist()


def test_without_draws_the_centre_is_read(photographs: Path) -> None:
    opened, ids = open_shards(photographs / "train"), np.arange(20)
    random = StreamReader(opened, Framing(32, 32, (36, 36), 2, RandomResizedCrop(32))).read(ids)[0]
    centre = StreamReader(opened, Framing(32, 32, (36, 36), 2)).read(ids)[0]
    assert torch.equal(random, centre)


def test_draws_at_decoding_are_others_than_those_of_the_batch() -> None:
    positions = torch.arange(2000)
    crops = Draws(3, 1, positions, positions, stream=AT_DECODING)
    batch = Draws(3, 1, positions, positions)
    seen = {value for _ in range(4) for value in crops.uniform(DRAWS).flatten().tolist()}
    assert not seen & {value for _ in range(20) for value in batch.uniform(3).flatten().tolist()}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resized_images_are_the_same_in_both_modes(version: CropVersion, shards: Path) -> None:
    opened, ids = open_shards(shards / "train"), np.array([3, 99])
    stream = StreamReader(opened, Framing.covering(20, 20, version)).read(ids)[0]
    assert stream.shape == (2, 20, 20, 3)
    assert torch.equal(load_resident(opened, Framing.covering(20, 20, version), CPU).read(ids)[0], stream)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_each_sample_once(shards: Path, world_size: int) -> None:
    opened = open_shards(shards / "test")
    by_rank = [
        list(
            test_batches(
                StreamReader(opened),
                np.arange(53),
                batch_size=10,
                rank=rank,
                world_size=world_size,
                normalize=Normalize([0.5] * 3, [0.25] * 3, (32, 32, 3), CPU),
                memory_format=torch.contiguous_format,
                device=CPU,
                workers=1,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(found) for found in by_rank}) == 1  # the same number of steps everywhere
    ids = [int(sample) for found in by_rank for _, _, part in found for sample in part]
    assert sorted(ids) == list(range(53))


class Recorder(StreamReader):
    """Remembers which shards were announced, and what was read after."""

    def __init__(self, shards: Path):
        super().__init__(open_shards(shards / "train"))
        self.announced: list[int] = []

    def will_need(self, shards: list[int]) -> None:
        self.announced += shards
        super().will_need(shards)


def test_shards_are_announced_once_and_a_block_ahead(shards: Path) -> None:
    reader = Recorder(shards)
    collect(batches(shards, reader, window=1), 1)  # positions 0..29: blocks 0 and 1 of 17 and 17 samples
    assert len(reader.announced) == 3
    collect(batches(shards, reader, window=1), 4)
    assert sorted(reader.announced[3:]) == list(range(6))


def test_read_ahead_keeps_order_and_raises_in_turn() -> None:
    def task(item: int) -> Callable[[], int]:
        def work() -> int:
            if item == 5:
                raise InputError("five is damaged")
            return item * 10

        return work

    results = read_ahead(iter(range(10)), task, workers=3)
    assert [next(results) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(InputError, match="five is damaged"):
        next(results)


def test_closing_leaves_no_thread(shards: Path) -> None:
    import threading

    made = batches(shards, StreamReader(open_shards(shards / "train")), workers=2).from_position(0, 0)
    list(next(made).micro_batches)
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    made.close()
    del made
    import gc

    gc.collect()
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
