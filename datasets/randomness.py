"""Random numbers that are functions of where they are used, not of what was drawn before.

Two kinds, both counter-based, so that any rank can compute any of them alone:
  philox_words   NumPy's raw Philox 4x64-10 words, for permutations on the host (Salmon et al. 2011, SC '11)
  Draws          a 64-bit integer hash in torch operations, for augmentation on the device the images are on
Only raw words are used: the distributions of numpy.random.Generator and torch.Generator may change between versions.
"""

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 2**64


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
    generator = np.random.Philox(key=np.array([word % _WORD for word in key], dtype=np.uint64), counter=start)
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def permutation(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """A uniformly distributed permutation of range(count): the order of `count` random words. int64, shape (count,)."""
    return np.argsort(philox_words(count, key, counter), kind="stable").astype(np.int64)


def derived_seed(*words: int) -> int:
    """A 63-bit seed that depends on every one of some words, such as (seed, step, rank)."""
    mixed = 0
    for word in words:
        mixed = _mix_host(mixed ^ (word % _WORD))
    return mixed >> 1


class Draws:
    """Random numbers for the samples of a batch, keyed by (seed, epoch, global position, stream).

    The hash is splitmix64's finalizer (Steele, Lea and Flood 2014, OOPSLA) over the position, started at a word that
    mixes seed, epoch and stream. Wrapping int64 arithmetic is the same on every device.
    """

    def __init__(self, seed: int, epoch: int, positions: torch.Tensor, sample_ids: torch.Tensor):
        """`positions`, `sample_ids`: int64, shape (batch,), on the device where the numbers are needed."""
        self.epoch = epoch
        self._seed = seed
        self._positions = positions
        self._sample_ids = sample_ids
        self._stream = 0

    def uniform(self, columns: int = 1) -> torch.Tensor:
        """float64 in [0, 1), shape (batch, columns). Each call takes the next stream."""
        return self._uniform(self._positions, self.epoch, columns)

    def uniform_by_sample(self, columns: int = 1) -> torch.Tensor:
        """The same, keyed by (seed, sample id, stream): a sample draws the same number in every epoch."""
        return self._uniform(self._sample_ids, -1, columns)

    def integers(self, bound: int, columns: int = 1) -> torch.Tensor:
        """int64 in [0, bound), shape (batch, columns)."""
        return (self.uniform(columns) * bound).long()

    def _uniform(self, index: torch.Tensor, epoch: int, columns: int) -> torch.Tensor:
        start = _mix_host(_mix_host(_mix_host(self._seed) ^ (epoch % _WORD)) ^ self._stream)
        self._stream += 1
        counter = index.unsqueeze(1) * columns + torch.arange(columns, device=index.device)
        return _shift_right(_mix(counter * _signed(_GOLDEN) + _signed(start)), 11).double() * 2.0**-53


def _mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def _mix_host(word: int) -> int:
    word = (word + _GOLDEN) % _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) % _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) % _WORD
    return word ^ (word >> 31)


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 >> copies the sign bit; the mask makes it the shift of an unsigned word
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
