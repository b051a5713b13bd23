"""Random numbers that depend on where they are used, never on earlier draws.

On the host: permutations, whole or in part, from NumPy's raw Philox 4x64-10 words (Salmon et al. 2011, SC '11). Only raw
words are used: the methods of numpy.random.Generator may change their stream between versions. On the images' device:
`Draws`, a hash of (seed, epoch, position, stream). Any rank can compute any sample's numbers, and a resumed run needs no
generator state.
"""

from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of splitmix64 (Steele, Lea and Flood 2014, OOPSLA)."""
WORD = 2**64
AT_DECODING = 2**32
"""First stream of what is drawn before there is a batch: far above those that its transforms use."""
_ROUNDS = 8  # even; from 5 on, outputs cannot be told from random ones by anything feasible (Patarin 2004, CRYPTO)


def philox_words(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """Return the first `count` words of the Philox stream with this key and counter. uint64, shape (count,).

    All are 64-bit words. The key is always (seed, epoch); the counter distinguishes streams with the same key.
    """
    start = np.array([0, *counter], dtype=np.uint64)  # the lowest word counts the blocks of the stream
    generator = np.random.Philox(key=np.array([word % WORD for word in key], dtype=np.uint64), counter=start)
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def permutation(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """Return a uniformly random permutation of range(count), the argsort of `count` random words. int64, shape (count,)."""
    return np.argsort(philox_words(count, key, counter), kind="stable").astype(np.int64)


def permutation_part(
    start: int, stop: int, count: int, key: tuple[int, int], counter: tuple[int, int, int]
) -> np.ndarray:
    """Return elements [start, stop) of a pseudorandom permutation of range(count), without the others. int64.

    A Feistel network with random functions (Luby and Rackoff 1988, SIAM J. Comput. 17): a number is split into two
    digits, left x width + right, and in each round one digit moves by a random function of the other. Time and memory are
    those of stop - start, plus 8 x sqrt(count) random words.
    """
    height = isqrt(count - 1) + 1  # the smallest with height x height >= count
    width = -(-count // height)
    sizes = (height, width) * (_ROUNDS // 2)
    words = philox_words(_ROUNDS * height, key, counter).reshape(_ROUNDS, height)
    moves = [(row % np.uint64(size)).astype(np.int64) for row, size in zip(words, sizes, strict=True)]

    def encipher(numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, width)
        for move, size in zip(moves, sizes, strict=True):
            left, right = right, (left + move[right]) % size
        return left * width + right

    found = encipher(np.arange(start, stop))
    # Fewer than `height` of the height x width numbers are past the end. Each is enciphered until it is not: this keeps
    # the function one to one (Black and Rogaway 2002, CT-RSA).
    while len(outside := np.flatnonzero(found >= count)):
        found[outside] = encipher(found[outside])
    return found


def derived_seed(*words: int) -> int:
    """Return a 63-bit seed that depends on every word, such as seed, step and rank."""
    mixed = 0
    for word in words:
        mixed = mix(mixed ^ (word % WORD))
    return mixed >> 1


def mix(word: int) -> int:
    """Take one step of splitmix64: every bit of the result depends on every bit of `word`."""
    word = (word + GOLDEN) % WORD
    word = ((word ^ (word >> 30)) * MIX_1) % WORD
    word = ((word ^ (word >> 27)) * MIX_2) % WORD
    return word ^ (word >> 31)


class Draws:
    """Random numbers for the samples of a batch, keyed by (seed, epoch, global position, stream).

    The hash is splitmix64's finalizer (Steele, Lea and Flood 2014, OOPSLA) over the position, started at a word that
    mixes seed, epoch and stream. Wrapping int64 arithmetic is the same on every device.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        positions: "Tensor",
        sample_ids: "Tensor",
        device: "torch.device | None" = None,
        stream: int = 0,
    ):
        """Start at a stream.

        Args:
            positions, sample_ids: int64, shape (batch,), on the host.
            device: where the numbers are needed; None is the host.
        """
        self.epoch, self._seed, self._device, self._stream = epoch, seed, device, stream
        self._host_positions, self._sample_ids = positions, sample_ids.to(device=device, non_blocking=True)
        self._positions = positions.to(device=device, non_blocking=True)

    def uniform(self, columns: int = 1) -> "Tensor":
        """Draw float64 in [0, 1), shape (batch, columns). Each call uses the next stream."""
        return self._uniform(self._positions, self.epoch, columns)

    def uniform_on_host(self, columns: int = 1) -> "Tensor":
        """Draw the numbers of uniform() on the host, for what decides which kernels run: a GPU is not waited for."""
        return self._uniform(self._host_positions, self.epoch, columns)

    def uniform_by_sample(self, columns: int = 1) -> "Tensor":
        """Draw as uniform(), keyed by (seed, sample id, stream): a sample gets the same number in every epoch."""
        return self._uniform(self._sample_ids, -1, columns)

    def integers(self, bound: int, columns: int = 1) -> "Tensor":
        """Draw int64 in [0, bound), shape (batch, columns)."""
        return (self.uniform(columns) * bound).long()

    def bytes(self, count: int) -> "Tensor":
        """Draw uint8 from all 256 values, shape (batch, count)."""
        import torch

        return self._words(self._positions, self.epoch, -(-count // 8)).view(torch.uint8)[:, :count]

    def of_pairs(self) -> "Draws":
        """Return draws for each two neighbours of the batch together, keyed by the first one's position."""
        return self.of_rows(slice(0, len(self._host_positions) // 2 * 2, 2))

    def of_rows(self, rows: "slice | Tensor") -> "Draws":
        """Return draws for some samples of the batch, from the next stream on; `rows` are on the host."""
        on_device = rows if isinstance(rows, slice) else rows.to(self._sample_ids.device, non_blocking=True)
        ids = self._sample_ids[on_device]
        return Draws(self._seed, self.epoch, self._host_positions[rows], ids, self._device, self._stream)

    def _uniform(self, index: "Tensor", epoch: int, columns: int) -> "Tensor":
        return _shift_right(self._words(index, epoch, columns), 11).double() * 2.0**-53

    def _words(self, index: "Tensor", epoch: int, columns: int) -> "Tensor":
        import torch  # here: `shards order` runs without it, in a fraction of a second

        start = mix(mix(mix(self._seed) ^ (epoch % WORD)) ^ self._stream)
        self._stream += 1
        counter = index.unsqueeze(1) * columns + torch.arange(columns, device=index.device)
        return _mix_words(counter * _signed(GOLDEN) + _signed(start))


def _mix_words(words: "Tensor") -> "Tensor":
    words = (words ^ _shift_right(words, 30)) * _signed(MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(MIX_2)
    return words ^ _shift_right(words, 31)


def _shift_right(words: "Tensor", bits: int) -> "Tensor":
    # int64 >> copies the sign bit; the mask makes it an unsigned shift
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word
