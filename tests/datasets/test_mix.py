"""data.mix: shares of every prefix, each set's own epochs, labels by name, and one description of several sets."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import ResolvedDataConfig
from shardstep.configs.selection import ClassWeights
from shardstep.datasets.manifest import ShardFolder, open_shards
from shardstep.datasets.mix import MixedShards, Turns, mix_shards
from shardstep.datasets.parts import Part, hold_out
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.sampling import strata_of
from shardstep.datasets.training_order import training_orders
from shardstep.datasets.write import write_shards
from tests.datasets.test_sources import png

some_weights = st.lists(
    st.integers(1, 100) | st.sampled_from([0.1, 0.25, 1 / 3, 0.70001, 1e-6, 12345.678, 1e9]), min_size=1, max_size=9
)


@given(some_weights, st.integers(0, 10**12))
def test_every_prefix_has_the_shares(weights: list[float], start: int) -> None:
    shares = np.array(weights) / sum(weights)
    for first in (0, start):
        positions = first + np.arange(400)
        counts = Turns(weights).before(positions)
        assert (counts.sum(axis=0) == positions).all()
        steps = np.diff(counts)
        assert ((steps == 0) | (steps == 1)).all()  # each position is one set's
        if first < 10**6:  # weights like 1/3 are rounded to 2**-30
            assert (abs(counts - np.outer(shares, positions)) < 2).all()


def test_turns_by_hand() -> None:
    # of P turns, the first set has 3/4, rounded (halves up): 0 1 2 2 3 4 5 5 6
    assert Turns([3, 1]).before(np.arange(9)).tolist() == [[0, 1, 2, 2, 3, 4, 5, 5, 6], [0, 0, 0, 1, 1, 1, 1, 2, 2]]
    assert Turns([7.5]).before(np.arange(4)).tolist() == [[0, 1, 2, 3]]


def write_set(
    folder: Path, classes: dict[str, int], mode: str = "RGB", size: tuple[int, int] = (32, 32)
) -> ShardFolder:
    """A set with so many images of each class, whose grey levels count from 0."""
    for name, images in classes.items():
        (folder / "images" / name).mkdir(parents=True)
        for number in range(images):
            (folder / "images" / name / f"{number}.png").write_bytes(png(number, size, mode))
    write_shards(str(folder / "images"), "train", folder / "shards", samples_per_shard=5)
    return open_shards(folder / "shards")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardFolder]:
    """Three sets: 61 and 30 images of all classes, and 12 images of two of them."""
    folder = tmp_path_factory.mktemp("sets")
    write_shards("synthetic:61", "train", folder / "a", samples_per_shard=17)
    write_shards("synthetic:30", "test", folder / "b", samples_per_shard=20)
    names = open_shards(folder / "a").manifest.classes
    return [*(open_shards(folder / name) for name in "ab"), write_set(folder / "c", {names[-1]: 5, names[2]: 7})]


def orders(part: Part, weights: list[float], **keys: object):  # type: ignore[no-untyped-def]
    assert isinstance(part.shards, MixedShards)
    mix = [{"dir": str(one.path), "weight": weight} for one, weight in zip(part.shards.sets, weights, strict=True)]
    config = ResolvedDataConfig(mix=mix, order_version=2, **keys)  # type: ignore[arg-type]
    strata = strata_of(part, ClassWeights({})) if config.sampling == "balanced" else None
    return training_orders(config, part, strata, 4)


@pytest.mark.parametrize("keys", [{}, {"lanes": 3, "window_shards": 2}, {"sampling": "balanced"}])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 5, 1]])
def test_each_set_goes_through_its_own_epochs(sets: list[ShardFolder], weights: list[float], keys: dict) -> None:
    mixed = Part(mix_shards(sets))
    assert isinstance(mixed.shards, MixedShards)
    made = orders(mixed, weights, **keys)
    epochs = [made.of_epoch(epoch).slice(0, 103) for epoch in range(8)]
    walk, bounds = np.concatenate(epochs), mixed.shards.first_ids
    assert mixed.samples == 103
    for number, one in enumerate(sets):
        own = walk[(walk >= bounds[number]) & (walk < bounds[number + 1])] - bounds[number]
        assert abs(len(own) - 8 * 103 * weights[number] / sum(weights)) < 2
        for start in range(0, len(own) - one.manifest.samples, one.manifest.samples):
            drawn = own[start : start + one.manifest.samples]
            if "sampling" in keys:
                per_class = np.bincount(one.labels[drawn], minlength=len(one.manifest.classes))
                assert per_class.max() - per_class.min() <= 1
            else:
                assert sorted(drawn) == list(range(one.manifest.samples))  # each once
    anew = orders(mixed, weights, **keys)
    assert anew.of_epoch(7).slice(30, 60).tolist() == epochs[7][30:60].tolist()


def test_blocks_have_the_shards_that_are_read(sets: list[ShardFolder]) -> None:
    mixed = Part(mix_shards(sets))
    order = orders(mixed, [1, 2, 3], lanes=2, window_shards=1).of_epoch(5)
    for position, sample in enumerate(order.slice(0, 103).tolist()):
        (block,) = order.blocks(position, position + 1)
        assert order.shards_of(*block) == [mixed.shards.index[sample]["shard"]]


def test_held_out_samples_are_each_sets_share_and_never_drawn(sets: list[ShardFolder]) -> None:
    mixed = mix_shards(sets)
    train, validation = hold_out(mixed, 0.25, 0)
    for first, end in zip(mixed.first_ids, mixed.first_ids[1:], strict=False):
        held_out = ((validation.all_ids() >= first) & (validation.all_ids() < end)).sum()
        assert abs(held_out - (end - first) / 4) <= 1
    made = orders(train, [1, 1, 4])
    drawn = {sample for epoch in range(6) for sample in made.of_epoch(epoch).slice(0, train.samples).tolist()}
    assert drawn == set(train.all_ids().tolist())


def test_several_sets_are_described_as_one(sets: list[ShardFolder]) -> None:
    mixed, reader = mix_shards(sets), StreamReader(mix_shards(sets))
    images, labels = reader.read(np.arange(103))
    names = [one.manifest.classes[label] for one in sets for label in one.labels]
    assert [mixed.manifest.classes[label] for label in labels.tolist()] == names
    assert (
        mixed.manifest.samples_per_class == np.bincount(labels.numpy(), minlength=len(mixed.manifest.classes)).tolist()
    )
    flat = images.double().flatten(0, 2) / 255
    assert mixed.manifest.mean == pytest.approx(flat.mean(dim=0).tolist(), abs=1e-6)
    assert mixed.manifest.std == pytest.approx(flat.std(dim=0, correction=0).tolist(), abs=1e-6)
    assert mixed.key(61) == f"{sets[1].path}/{sets[1].key(0)}"
    assert mixed.shard_path(len(sets[0].manifest.shards)) == sets[1].shard_path(0)


def test_the_fingerprint_is_of_contents_not_of_places(sets: list[ShardFolder], tmp_path: Path) -> None:
    shutil.copytree(sets[0].path, tmp_path / "moved")
    moved = mix_shards([open_shards(tmp_path / "moved"), *sets[1:]])
    assert moved.manifest.fingerprint == mix_shards(sets).manifest.fingerprint
    assert moved.manifest.fingerprint != mix_shards([sets[1], sets[0], sets[2]]).manifest.fingerprint


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_grey_sets_are_mixed_in_colour(order: list[int], tmp_path: Path) -> None:
    pair = [write_set(tmp_path / "grey", {"cat": 3}, "L"), write_set(tmp_path / "red", {"cat": 2, "dog": 2})]
    mixed = mix_shards([pair[number] for number in order])
    assert (mixed.manifest.image_mode, mixed.manifest.image_shape) == ("RGB", [3, 32, 32])
    assert len(mixed.manifest.mean) == 3
    assert StreamReader(mixed).read(np.arange(7))[0].shape == (7, 32, 32, 3)


def test_sets_of_several_sizes_need_resize(tmp_path: Path) -> None:
    pair = [write_set(tmp_path / str(side), {"cat": 2}, size=(side, side)) for side in (8, 9)]
    with pytest.raises(InputError, match="differ in size: set data.resize"):
        StreamReader(mix_shards(pair))


def test_a_class_that_no_set_shares_is_refused(tmp_path: Path) -> None:
    pair = [write_set(tmp_path / "a", {"cat": 2, "dog": 2}), write_set(tmp_path / "b", {"cat": 1, "dgo": 1})]
    with pytest.raises(InputError, match=r"b/shards has dgo, which .*a/shards lacks \(did you mean dog\?\)"):
        mix_shards(pair)


def test_damage_is_reported_by_the_file_of_its_set(tmp_path: Path) -> None:
    pair = [write_set(tmp_path / name, {"cat": 2}) for name in "ab"]
    path = pair[1].shard_path(0)
    content = bytearray(path.read_bytes())
    content[int(pair[1].index["block"][0]) * 512 + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        StreamReader(mix_shards(pair)).read(np.arange(4))
    assert f"{path}: sample {pair[1].path}/" in str(raised.value)
    assert f"`shardstep shards verify {pair[1].path}`" in str(raised.value)
