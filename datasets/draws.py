"""Random numbers for augmentation, on the device where the images are: functions of (seed, epoch, position, stream).

Any rank can compute any sample's numbers alone, and a resumed run needs no generator's state.
"""

import torch

from shardstep.datasets.randomness import GOLDEN, MIX_1, MIX_2, WORD, mix


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
        start = mix(mix(mix(self._seed) ^ (epoch % WORD)) ^ self._stream)
        self._stream += 1
        counter = index.unsqueeze(1) * columns + torch.arange(columns, device=index.device)
        return _shift_right(_mix_words(counter * _signed(GOLDEN) + _signed(start)), 11).double() * 2.0**-53


def _mix_words(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(MIX_2)
    return words ^ _shift_right(words, 31)


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 >> copies the sign bit; the mask makes it the shift of an unsigned word
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word
