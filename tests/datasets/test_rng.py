import numpy as np
import torch

from shardstep.datasets.rng import Draws, derived_seed, mix, philox_words


def draws(positions: list[int], seed: int = 1, epoch: int = 2) -> Draws:
    index = torch.tensor(positions)
    return Draws(seed, epoch, index, index)


def splitmix64(state: int) -> int:
    """The finalizer of splitmix64, from its published C, in Python's integers."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_draws_are_splitmix64_of_the_position() -> None:
    first, second = draws([0, 1]).uniform()[:, 0].tolist()
    # the start word is hidden in the class; two neighbouring positions are one golden-ratio step apart
    golden = 0x9E3779B97F4A7C15
    start = mix(mix(mix(1) ^ 2) ^ 0)
    assert first == (splitmix64(start) >> 11) * 2.0**-53
    assert second == (splitmix64(start + golden) >> 11) * 2.0**-53


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = draws([3, 4, 5]).uniform(2)
    alone = draws([4]).uniform(2)
    assert torch.equal(together[1:2], alone)


def test_streams_seeds_and_epochs_differ() -> None:
    one = draws([7])
    values = {
        one.uniform().item(),
        one.uniform().item(),
        draws([7], seed=2).uniform().item(),
        draws([7], epoch=3).uniform().item(),
        draws([8]).uniform().item(),
    }
    assert len(values) == 5


def test_uniform_is_uniform() -> None:
    values = draws(list(range(100_000))).uniform(3)
    # mean 1/2 +- 0.0005, variance 1/12, no correlation between columns or neighbours
    assert abs(values.mean() - 0.5) < 0.003
    assert abs(values.var() - 1 / 12) < 0.001
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0]]))[0, 1]) < 0.02


def test_integers_reach_all_values_evenly() -> None:
    counts = torch.bincount(draws(list(range(90_000))).integers(9)[:, 0])
    assert len(counts) == 9
    assert (counts - 10_000).abs().max() < 500  # 5 standard deviations of sqrt(90000 * 1/9 * 8/9) = 94


def test_by_sample_ignores_epoch_and_position() -> None:
    ids = torch.tensor([5])
    first = Draws(1, 0, torch.tensor([17]), ids).uniform_by_sample()
    assert torch.equal(first, Draws(1, 9, torch.tensor([3]), ids).uniform_by_sample())


def test_philox_is_the_published_one() -> None:
    # Random123's known answers for philox4x64-10, key 0, counter 0; NumPy counts up before the first block.
    words = philox_words(4, (0, 0), (2**64 - 1, 2**64 - 1, 2**64 - 1))
    assert len(words) == 4
    start = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [hex(word) for word in start.tolist()] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


def test_derived_seed_depends_on_every_word() -> None:
    assert len({derived_seed(1, 2, 3), derived_seed(2, 2, 3), derived_seed(1, 3, 3), derived_seed(1, 2, 4)}) == 4
    assert 0 <= derived_seed(5, 6, 7) < 2**63
