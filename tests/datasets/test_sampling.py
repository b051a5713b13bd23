"""data.sampling and data.repeats: how often samples come in each epoch and over all of them, for any labels and weights."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import ResolvedDataConfig
from shardstep.configs.selection import ClassWeights, WeightTable, sampling_of
from shardstep.datasets.manifest import INDEX_DTYPE, Manifest, Shard, ShardFolder, open_shards
from shardstep.datasets.parts import Part, hold_out
from shardstep.datasets.sampling import Sampling, Strata, strata_of
from shardstep.datasets.training_order import training_orders

CLASSES = ["cat", "dog", "owl"]


def labelled(labels: list[int], shard_size: int = 7) -> Part:
    """A data set with these labels, of which only the index exists."""
    index = np.zeros(len(labels), dtype=INDEX_DTYPE)
    index["label"] = labels
    sizes = [min(shard_size, len(labels) - first) for first in range(0, len(labels), shard_size)]
    shards = [Shard(f"{number}.tar", 0, "", size) for number, size in enumerate(sizes)]
    manifest = Manifest(CLASSES, len(labels), [], "RGB", None, [], [], [], {}, shards, "")
    return Part(ShardFolder(Path("set"), manifest, index))


def epochs_of(part: Part, strata: Strata | None, draws: int, epochs: int, seed: int = 0) -> list[np.ndarray]:
    """How often each sample of the data set comes in each epoch."""
    sampling = Sampling(part, strata, draws, seed)
    return [np.bincount(sampling.of_epoch(epoch).all_ids(), minlength=part.manifest.samples) for epoch in range(epochs)]


label_lists = st.lists(st.integers(0, 2), min_size=1, max_size=60)
class_weights = st.dictionaries(st.sampled_from(CLASSES), st.sampled_from([0.5, 1, 2, 3.3, 100]))


def between(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether all counts are their expectations, rounded down or up."""
    return bool(((np.floor(expected - 1e-9) <= counts) & (counts <= np.ceil(expected + 1e-9))).all())


@given(label_lists, class_weights, st.integers(1, 80), st.integers(0, 2**63 - 1))
def test_classes_come_in_their_shares_and_no_sample_again_before_all_of_its_class(
    labels: list[int], weights: dict[str, float], draws: int, seed: int
) -> None:
    present = sorted(set(labels))
    weights = {name: weight for name, weight in weights.items() if CLASSES.index(name) in present}
    part = labelled(labels)
    epochs = epochs_of(part, strata_of(part, ClassWeights(weights)), draws, 5, seed)
    shares = np.array([weights.get(CLASSES[label], 1.0) for label in present])
    total = np.zeros(len(labels), dtype=np.int64)
    for counts in epochs:
        total += counts
        assert counts.sum() == draws
        per_class = np.array([counts[np.array(labels) == label].sum() for label in present])
        assert between(per_class, draws * shares / shares.sum()), per_class
        for label in present:
            for of_class in (counts[np.array(labels) == label], total[np.array(labels) == label]):
                assert of_class.max() - of_class.min() <= 1


@given(
    st.lists(
        st.sampled_from([0.0, 0.1, 0.25, 1, 1.5, 7]) | st.floats(0, 1e300, allow_subnormal=False),
        min_size=1,
        max_size=60,
    )
)
def test_each_sample_comes_as_often_as_its_weight_says(given_weights: list[float]) -> None:
    weights = np.array(given_weights)
    if not weights.any():
        return
    part = labelled([0] * len(weights))
    values, alike = np.unique(weights, return_inverse=True)
    expected = weights / weights.max()
    expected *= len(weights) / expected.sum()
    for counts in epochs_of(part, Strata(alike, values / values.max() * np.bincount(alike)), len(weights), 4):
        assert counts.sum() == len(weights)
        assert between(counts, expected)


@given(label_lists, st.integers(1, 6))
def test_repeats_walk_through_all_samples(labels: list[int], repeats: int) -> None:
    # 10 samples, 3 repeats: 4 + 4 + 2 (and 2 again) samples in three epochs
    draws = -(-len(labels) // repeats)
    total = sum(epochs_of(labelled(labels), None, draws, repeats + 1), start=np.zeros(len(labels), dtype=np.int64))
    assert total.sum() == draws * (repeats + 1)
    assert total.max() - total.min() <= 1


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_does_not_depend_on_those_before(epoch: int) -> None:
    part = labelled([0] * 20 + [1] * 3 + [2] * 9)
    strata = strata_of(part, ClassWeights({"cat": 0.3}))
    going_on, anew = (Sampling(part, strata, 32, 5) for _ in range(2))
    walked = [going_on.of_epoch(number).all_ids().tolist() for number in range(8)]
    assert anew.of_epoch(epoch).all_ids().tolist() == walked[epoch]
    assert going_on.of_epoch(epoch).all_ids().tolist() == walked[epoch]  # back again


def test_rounding_evens_out_over_epochs() -> None:
    # 10 draws an epoch from classes with a third each: 3, 3 and 4, and not always the same class has 4
    part = labelled([0, 1, 2] * 5)
    counts = sum(epochs_of(part, strata_of(part, ClassWeights({})), 10, 60), start=np.zeros(15, dtype=np.int64))
    assert (abs(counts.reshape(5, 3).sum(axis=0) - 200) < 2).all()


def test_what_is_drawn_is_pinned() -> None:
    # A golden value: resumed runs must see the same samples.
    part = labelled([0] * 8 + [1] * 4)
    drawn = [Sampling(part, strata_of(part, ClassWeights({})), 12, 3).of_epoch(epoch).all_ids() for epoch in (0, 1)]
    assert [ids.tolist() for ids in drawn] == [
        [0, 2, 4, 5, 6, 7, 8, 8, 9, 10, 11, 11],
        [0, 1, 3, 4, 5, 7, 8, 9, 9, 10, 10, 11],
    ]
    # 6 of 8 cats in the first epoch; the other 2, and the first 4 again, in the second
    assert len(set(drawn[0][drawn[0] < 8]) | set(drawn[1][drawn[1] < 8])) == 8


CONFIGS = [
    {"sampling": "balanced"},
    {"sampling": {"weights": {"cat": 5, "owl": 0}}},
    {"repeats": 3},
    {"sampling": "balanced", "repeats": 4},
]


@pytest.mark.parametrize("keys", CONFIGS)
@pytest.mark.parametrize(("lanes", "window"), [(1, "all"), (1, 2), (3, 2)])
def test_orders_draw_only_from_what_is_left_and_from_their_windows(keys: dict, lanes: int, window: int | str) -> None:
    whole = labelled([0] * 50 + [1] * 21 + [2] * 30)
    train, validation = hold_out(whole.shards, 0.2, 0)
    config = ResolvedDataConfig(lanes=lanes, window_shards=window, order_version=2, **keys)
    orders = training_orders(config, train, strata_of(train, sampling_of(config)), 9)
    starts = np.cumsum([0, *whole.samples_per_shard])
    for epoch in (0, 3):
        order = orders.of_epoch(epoch)
        ids = order.slice(0, train.samples)
        assert not set(ids) & set(validation.all_ids())
        assert orders.of_epoch(epoch).slice(17, 40).tolist() == ids[17:40].tolist()
        for position in range(train.samples):
            for block in order.blocks(position, position + 1):
                shards = order.shards_of(*block)
                assert np.searchsorted(starts, ids[position], side="right") - 1 in shards
                assert window == "all" or len(shards) <= 2
    assert orders.of_epoch(0).slice(0, 30).tolist() != orders.of_epoch(1).slice(0, 30).tolist()


@given(st.integers(1, 40), st.integers(1, 7))
def test_copies_come_in_a_row(samples: int, repeats: int) -> None:
    config = ResolvedDataConfig(repeats=repeats, order_version=2)
    ids = training_orders(config, labelled([0] * samples), None, 1).of_epoch(0).slice(0, samples)
    rows = [ids[start : start + repeats] for start in range(0, samples, repeats)]
    assert all(len(set(row)) == 1 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)  # another sample in each


WEIGHTS = "key,weight\n" + "".join(f"{number:06d},{number % 3}\n" for number in range(101))


@pytest.mark.parametrize(
    ("name", "content", "setting", "message"),
    [
        ("w.csv", WEIGHTS, {}, ""),
        ("w.tsv", WEIGHTS.replace(",", "\t").replace("weight", "hard"), {"column": "hard"}, ""),
        ("w.csv", WEIGHTS, {"column": "wieght"}, "has no column wieght, only key, weight"),
        ("w.csv", WEIGHTS.replace("key", "sample"), {}, "has no column key, only sample, weight"),
        ("w.csv", WEIGHTS.replace("000007,1\n", ""), {}, "1 key not at all: 000007"),
        ("w.csv", WEIGHTS + "000007,1\n", {}, "1 key twice or more: 000007"),
        ("w.csv", WEIGHTS + "x,1\n", {}, "does not have: x"),
        ("w.csv", WEIGHTS.replace("000007,1", "000007,much"), {}, "the weight of 000007 is no number: 'much'"),
        ("w.csv", WEIGHTS.replace("000007,1", "000007,-1"), {}, "1 weight that are no numbers from 0, such as -1.0"),
        ("w.csv", WEIGHTS.replace("000007,1", "000007,nan"), {}, "such as nan for 000007"),
        ("w.csv", "key,weight\n" + "".join(f"{number:06d},0\n" for number in range(101)), {}, "are 0"),
        ("w.csv", "", {}, "has no rows"),
        ("w.txt.gz", WEIGHTS, {}, "is no table"),
        ("w.npy", WEIGHTS, {}, "is no array of numbers"),
        ("w.npy", np.array([(number % 3) / 3 for number in range(101)]), {}, ""),
        ("w.npy", np.arange(101.0).reshape(1, -1), {}, "its shape is (1, 101)"),
        ("w.npy", np.arange(100), {}, "one weight for each of the 101 samples"),
        ("w.npy", np.array(["a"] * 101), {}, "must hold numbers"),
        ("", "", {}, "cannot be read: Is a directory"),
        ("none/w.csv", None, {}, "cannot be read: No such file or directory"),
    ],
)
def test_tables_of_weights(
    name: str, content: str | np.ndarray | None, setting: dict, message: str, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None and name:
        path.write_text(content)
    part = Part(open_shards(shards / "train"))
    if message:
        with pytest.raises(InputError) as raised:
            strata_of(part, WeightTable(str(path), **setting))
        assert message in str(raised.value)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        return
    strata = strata_of(part, WeightTable(str(path), **setting))
    assert strata
    keys = [int(part.shards.key(sample)) for sample in range(101)]
    wanted = np.array(range(101) if name.endswith("npy") else keys) % 3
    counts = sum(epochs_of(part, strata, 101, 4), start=np.zeros(101))
    # weights of 0, 1 and 2 whose sum is 100: 4 epochs have them 0, 4.04 and 8.08 times
    assert (abs(counts - 4.04 * wanted) < 2).all()
    assert ((wanted == 0) == (counts == 0)).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"catt": 1}, "set has no class catt; did you mean cat?"),
        ({"owl": 2}, "set has nothing of owl to train on"),
        ({"cat": 0, "dog": 0}, "the weights of all classes that set has samples of are 0"),
        ({"owl": 0}, ""),
    ],
)
def test_weights_of_classes(weights: dict[str, float], message: str) -> None:
    part = labelled([0] * 5 + [1] * 2)
    if not message:
        strata_of(part, ClassWeights(weights))
        return
    with pytest.raises(InputError, match=r"data\.sampling: ") as raised:
        strata_of(part, ClassWeights(weights))
    assert message in str(raised.value)
