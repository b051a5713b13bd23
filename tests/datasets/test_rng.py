from itertools import combinations

import numpy as np
import pytest
import torch

from shardstep.datasets.rng import Draws, derived_seed, mix, permutation_part, philox_words


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


# --- a permutation in parts -------------------------------------------------------------------------------------------

MANY = 100_003  # a prime: no digits fit it exactly


def part(start: int, stop: int, count: int, seed: int = 1, epoch: int = 2, block: int = 0) -> np.ndarray:
    return permutation_part(start, stop, count, (seed, epoch), (2, 0, block))


def deviation(counts: np.ndarray, degrees: int) -> float:
    """Chi-square against equal counts, as standard deviations from its mean: chi-square is `degrees` +- sqrt(2 degrees)."""
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return float((chi_square - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize("count", [*range(1, 201), 255, 256, 257, 9_999, 10_000, 10_001, 65_537, MANY])
def test_a_permutation_in_parts_has_every_number_once(count: int) -> None:
    assert np.array_equal(np.sort(part(0, count, count)), np.arange(count))


def test_any_part_is_that_of_the_whole() -> None:
    for count in (1, 2, 30, 1_000):
        whole = part(0, count, count)
        for start in range(0, count, 7):
            for stop in (start, start + 1, min(start + 20, count), count):
                assert np.array_equal(part(start, stop, count), whole[start:stop])


def test_parts_of_huge_permutations_cost_no_more_than_themselves() -> None:
    # 1e12 numbers would take 8 TB. The words are 8 x sqrt(count) = 8e6.
    ids = part(10**12 - 1024, 10**12, 10**12)
    assert len(set(ids.tolist())) == 1024
    assert 0 <= ids.min() < 2e10  # 1e12 / 1024 = 1e9 on average
    assert 98e10 < ids.max() < 10**12


def test_places_and_numbers_of_a_permutation_are_independent() -> None:
    # 64 x 64 cells of place and number; both margins are fixed: (64 - 1)^2 degrees of freedom
    for seed in range(10):
        cells = np.arange(MANY) * 64 // MANY * 64 + part(0, MANY, MANY, seed) * 64 // MANY
        assert abs(deviation(np.bincount(cells, minlength=64**2), 63**2)) < 5


def test_every_number_of_a_small_permutation_is_everywhere_equally_often() -> None:
    places = np.zeros((10, 10))
    for epoch in range(4000):
        places[np.arange(10), part(0, 10, 10, epoch=epoch)] += 1
    assert abs(deviation(places, 9**2)) < 5


def test_neighbours_in_a_permutation_are_unrelated() -> None:
    # The cipher's digits have 316 values. Each statistic is a standard normal; of 4 rounds instead of 8, some are above 10.
    for seed in range(5):
        numbers = part(0, MANY, MANY, seed)
        for distance in (1, 2, 316, 317, 632):
            one, other = numbers[:-distance], numbers[distance:]
            pairs = len(one)
            assert abs(np.corrcoef(one, other)[0, 1]) * pairs**0.5 < 5
            steps = (other - one) % MANY
            assert abs(deviation(np.bincount(steps * 200 // MANY, minlength=200), 199)) < 5
            expected = pairs / 317  # pairs with the same left digit
            assert abs((one // 317 == other // 317).sum() - expected) < 5 * expected**0.5


def test_permutations_of_other_seeds_epochs_and_blocks_are_unrelated() -> None:
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (2**63 - 1, 0, 0), (0, 0, 1), (1, 1, 1)]
    for one, other in combinations([part(0, MANY, MANY, *key) for key in keys], 2):
        assert (one == other).sum() < 10  # one on average, as for random permutations
        assert abs(np.corrcoef(one, other)[0, 1]) * MANY**0.5 < 5
