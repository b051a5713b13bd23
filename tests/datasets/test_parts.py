"""What is held out for validation: by class, the same everywhere, and for folds every sample once."""

from pathlib import Path

import numpy as np
import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.held_out import Fold, held_out_problems, parse_fold
from shardstep.configs.schema import DataConfig
from shardstep.datasets.manifest import INDEX_DTYPE, Manifest, Shard, ShardFolder
from shardstep.datasets.order import EpochOrder
from shardstep.datasets.parts import Part, hold_out


def data_set(labels: list[int], shards: list[int]) -> ShardFolder:
    """A data set with these labels in shards of these sizes; only its index exists."""
    index = np.zeros(len(labels), dtype=INDEX_DTYPE)
    index["label"] = labels
    described = [Shard(f"{number}.tar", 0, "", size) for number, size in enumerate(shards)]
    manifest = Manifest([], len(labels), [], "RGB", None, [], [], [], {}, described, "")
    return ShardFolder(Path("set"), manifest, index)


LABELS = [0] * 40 + [1] * 20 + [2] * 3 + [0] * 17  # 57, 20 and 3 of a class


@pytest.mark.parametrize(("share", "sizes"), [(0.1, (72, 8)), (0.25, (60, 20)), (0.999, (0, 80)), (0.9, (8, 72))])
def test_every_class_has_its_share(share: float, sizes: tuple[int, int]) -> None:
    shards = data_set(LABELS, [80])
    if 0 in sizes:
        with pytest.raises(InputError, match=r"80 samples: data.validation=0.999 leaves none to train on"):
            hold_out(shards, share, 0)
        return
    train, validation = hold_out(shards, share, 0)
    assert (train.samples, validation.samples) == sizes
    assert sorted([*train.all_ids(), *validation.all_ids()]) == list(range(80))
    for label, count in ((0, 57), (1, 20), (2, 3)):
        held_out = int((shards.labels[validation.all_ids()] == label).sum())
        assert abs(held_out - share * count) < 1, label


def test_folds_share_nothing_and_are_the_whole_set() -> None:
    shards = data_set(LABELS, [80])
    folds = [hold_out(shards, Fold(number, 5), 0)[1].all_ids() for number in range(1, 6)]
    assert sorted(np.concatenate(folds)) == list(range(80))
    for ids in folds:
        assert len(ids) == 16
        per_class = np.bincount(shards.labels[ids], minlength=3)
        assert (abs(per_class - np.array([57, 20, 3]) / 5) < 1).all()


def test_it_depends_on_the_seed_alone() -> None:
    shards = data_set(LABELS, [80])
    held_out = [hold_out(shards, 0.1, seed)[1].all_ids().tolist() for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] == [8, 22, 25, 42, 52, 60, 66, 69]  # a golden value: it may never change
    assert held_out[0] != held_out[2]


def test_an_order_of_a_part_has_its_samples_once_shard_by_shard() -> None:
    train, _ = hold_out(data_set(LABELS, [30, 1, 0, 49]), 0.5, 0)
    counts = train.samples_per_shard
    starts = [0, 30, 31, 31, 80]
    for shard, count in enumerate(counts):
        assert count == sum(starts[shard] <= sample < starts[shard + 1] for sample in train.all_ids()), shard
    order = EpochOrder(counts, 0, 0, 1, 1)  # shard by shard
    ids = train.ids_of(order.slice(0, train.samples))
    assert sorted(ids) == train.all_ids().tolist()
    assert len(set(np.searchsorted(starts, ids[: counts[order.shards_of(0, 0)[0]]], side="right"))) == 1


def test_a_whole_set_has_no_ids_of_its_own() -> None:
    whole = Part(data_set(LABELS, [30, 50]))
    assert (whole.samples, whole.samples_per_shard, whole.first(3).tolist()) == (80, [30, 50], [0, 1, 2])


@pytest.mark.parametrize("text", ["", "1", "0/5", "6/5", "1/1", "-1/5", "1/5/2", "a/b", "1.0/5", "1 / 5x"])
def test_what_is_no_fold(text: str) -> None:
    assert parse_fold(text) is None
    assert held_out_problems(DataConfig(fold=text)) == [
        f"data.fold={text} must be one of several parts, such as 2/5: the second of five"
    ]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (DataConfig(validation=0.1, fold="1/5"), "data.fold=1/5 and data.validation=0.1 both hold samples out"),
        (DataConfig(validation=0), "data.validation=0 must be a share between 0 and 1"),
        (DataConfig(validation=1.0), "data.validation=1.0 must be a share"),
        (DataConfig(validation=20), "data.validation=20 must be a share"),
        (DataConfig(validation=True), "data.validation=True must be a share"),
        (DataConfig(validation=[0.1]), "data.validation=[0.1] must be a share"),
        (DataConfig(validation=float("nan")), "data.validation=nan must be a share"),
        (DataConfig(test="none"), "data.test=none leaves nothing to evaluate on"),
    ],
)
def test_problems(config: DataConfig, problem: str) -> None:
    (found,) = held_out_problems(config)
    assert found.startswith(problem)


def test_folds_with_spaces() -> None:
    assert parse_fold(" 2 / 5 ") == Fold(2, 5)
