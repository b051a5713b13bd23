"""Guarantee 1, first half: the global order is a pure function of (seed, epoch, shard counts, lanes, window, version)."""

import hashlib
import tracemalloc
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstep.configs.schema import OrderVersion
from shardstep.datasets import order as orders
from shardstep.datasets.order import ORDER_VERSION, EpochOrder


def in_tiny_chunks(*args: object) -> EpochOrder:
    """Version 2, as if a few samples were many: the cipher permutes blocks of more than 3 to 7."""
    with mock.patch.multiple(orders, _CHUNK=7, _SMALLEST_CHUNK=3):
        return EpochOrder(*args, version=2)  # type: ignore[arg-type]


kinds = st.sampled_from([partial(EpochOrder, version=1), partial(EpochOrder, version=2), in_tiny_chunks])
counts = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda values: sum(values) > 0)
seeds, epochs = st.integers(0, 2**63 - 1), st.integers(0, 10_000)
lanes, windows = st.integers(1, 9), st.one_of(st.none(), st.integers(1, 14))


@given(kinds, counts, seeds, epochs, lanes, windows)
def test_an_epoch_holds_every_sample_once(
    kind: Callable[..., EpochOrder], shards: list[int], seed: int, epoch: int, num_lanes: int, window: int | None
) -> None:
    order = kind(shards, seed, epoch, num_lanes, window)
    assert sorted(order.slice(0, sum(shards))) == list(range(sum(shards)))


@given(kinds, counts, seeds, epochs, lanes, windows, st.data())
def test_slices_are_parts_of_the_whole(
    kind: Callable[..., EpochOrder],
    shards: list[int],
    seed: int,
    epoch: int,
    num_lanes: int,
    window: int | None,
    data: st.DataObject,
) -> None:
    total = sum(shards)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole = kind(shards, seed, epoch, num_lanes, window).slice(0, total)
    part = kind(shards, seed, epoch, num_lanes, window).slice(start, stop)  # a new object: never saw the start
    assert part.tolist() == whole[start:stop].tolist()


@given(kinds, counts, seeds, epochs, lanes, windows)
def test_a_position_reads_only_from_its_blocks_shards(
    kind: Callable[..., EpochOrder], shards: list[int], seed: int, epoch: int, num_lanes: int, window: int | None
) -> None:
    order = kind(shards, seed, epoch, num_lanes, window)
    shard_of = np.repeat(np.arange(len(shards)), shards)
    for position in range(sum(shards)):
        (block,) = order.blocks(position, position + 1)
        allowed = order.shards_of(*block)
        assert shard_of[order.slice(position, position + 1)[0]] in allowed
        if window is not None:
            assert len(allowed) <= window


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(EpochOrder([50, 50], seed, epoch).slice(0, 100)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("kind", [EpochOrder, in_tiny_chunks])
def test_window_all_with_one_lane_is_a_uniform_permutation(kind: Callable[..., EpochOrder]) -> None:
    # Each of 6 samples must be at each of 6 places in 1/6 of 6000 epochs: 1000 +- 29 (one standard deviation).
    places = np.zeros((6, 6))
    for epoch in range(6000):
        places[np.arange(6), kind([2, 1, 3], 7, epoch).slice(0, 6)] += 1
    assert abs(places - 1000).max() < 5 * 29


def test_a_window_of_one_shard_keeps_shards_together() -> None:
    order = EpochOrder([10, 10, 10], seed=3, epoch=0, window_shards=1)
    shards = order.slice(0, 30) // 10
    assert [len(set(shards[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1]


def test_lanes_take_turns() -> None:
    # two lanes of a line of 4 one-shard blocks: even positions come from the first half of the line, odd from the second
    order = EpochOrder([5, 5, 5, 5], seed=1, epoch=2, lanes=2, window_shards=1)
    ids = order.slice(0, 20)
    first, second = set(ids[0::2] // 5), set(ids[1::2] // 5)
    assert len(first) == len(second) == 2
    assert not first & second


@pytest.mark.parametrize(("num_lanes", "window"), [(1, None), (1, 4), (8, 400), (64, None), (1024, None)])
def test_far_into_a_big_epoch_takes_little_memory(num_lanes: int, window: int | None) -> None:
    tracemalloc.start()  # NumPy's arrays, too
    try:
        order = EpochOrder([10_000] * 10_000, seed=1, epoch=1, lanes=num_lanes, window_shards=window)
        ids = order.slice(73_000_000, 73_001_024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(ids.tolist())) == 1024
    # A whole permutation of 1e8 samples is 800 MB. Beside the shards' 10,000 numbers in four arrays and a list: up to
    # 65,536 ids of 8 bytes that stay, or 1,024 per lane, and at most twenty temporary arrays like one lane's.
    assert peak < 1_000_000 + 8 * max(65_536, 1_024 * num_lanes) + 20 * 8 * max(65_536 // num_lanes, 10_000)


def test_small_data_sets_have_the_same_order_in_both_versions() -> None:
    for shards, num_lanes, window in (([50_000], 1, None), ([65_536], 1, None), ([9_000] * 7, 3, 2), ([70_000], 2, 1)):
        one, two = (EpochOrder(shards, 3, 1, num_lanes, window, version) for version in (1, 2))
        same = np.array_equal(one.slice(0, sum(shards)), two.slice(0, sum(shards)))
        assert same == (sum(shards) <= 65_536)


PINNED: list[tuple[OrderVersion, list[int], int, int | None, str]] = [
    (1, [100, 57, 100, 3, 100], 1, None, "9fcf1500adbff420"),
    (1, [100, 57, 100, 3, 100], 3, 2, "6a0c40edba7c013f"),
    (2, [100, 57, 100, 3, 100], 1, None, "9fcf1500adbff420"),
    (2, [100, 57, 100, 3, 100], 3, 2, "6a0c40edba7c013f"),
    (1, [40_000, 70_001, 90_000], 1, None, "466e5944fca297af"),
    (2, [40_000, 70_001, 90_000], 1, None, "eef7a819e7d8af42"),
    (2, [40_000, 70_001, 90_000], 3, None, "dc5bc4243bcb2f16"),
    (2, [40_000, 70_001, 90_000], 2, 1, "87eb66758d68f7e5"),
]


@pytest.mark.parametrize(("version", "shards", "num_lanes", "window", "digest"), PINNED)
def test_every_version_is_pinned(
    version: OrderVersion, shards: list[int], num_lanes: int, window: int | None, digest: str
) -> None:
    # If this fails, resumed runs would see other samples: add a version instead, and keep the old ones readable.
    order = EpochOrder(shards, 2026, 11, num_lanes, window, version)
    ids = order.slice(0, sum(shards)).astype("<i8").tobytes()
    assert hashlib.sha256(ids).hexdigest()[:16] == digest


def test_the_first_samples_of_an_epoch_are_pinned() -> None:
    assert ORDER_VERSION == 2
    assert EpochOrder([10_000] * 10_000, seed=0, epoch=0).slice(0, 4).tolist() == [5033386, 54783394, 2813178, 83582040]
    assert EpochOrder([10_000] * 10_000, seed=0, epoch=1).slice(99_999_998, 10**8).tolist() == [29874663, 30951956]
