"""Random numbers on the host that are functions of where they are used, not of what was drawn before.

Permutations come from NumPy's raw Philox 4x64-10 words (Salmon et al. 2011, SC '11). Only raw words are used: the methods
of numpy.random.Generator may give other numbers in another version.
"""

import numpy as np

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of splitmix64 (Steele, Lea and Flood 2014, OOPSLA)."""
WORD = 2**64


def philox_words(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """The first `count` words of the Philox stream that `key` and `counter` name.

    Args:
        count: how many words.
        key: two 64-bit words, here always (seed, epoch).
        counter: three 64-bit words that tell streams with the same key apart.

    Returns:
        uint64 array of shape (count,).
    """
    start = np.array([0, *counter], dtype=np.uint64)  # the lowest word counts the blocks of the stream
    generator = np.random.Philox(key=np.array([word % WORD for word in key], dtype=np.uint64), counter=start)
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def permutation(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """A uniformly distributed permutation of range(count): the order of `count` random words. int64, shape (count,)."""
    return np.argsort(philox_words(count, key, counter), kind="stable").astype(np.int64)


def derived_seed(*words: int) -> int:
    """A 63-bit seed that depends on every one of some words, such as (seed, step, rank)."""
    mixed = 0
    for word in words:
        mixed = mix(mixed ^ (word % WORD))
    return mixed >> 1


def mix(word: int) -> int:
    """One step of splitmix64: a 64-bit word whose every bit depends on every bit of `word`."""
    word = (word + GOLDEN) % WORD
    word = ((word ^ (word >> 30)) * MIX_1) % WORD
    word = ((word ^ (word >> 27)) * MIX_2) % WORD
    return word ^ (word >> 31)
