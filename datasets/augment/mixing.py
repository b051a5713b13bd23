"""mixup and cutmix: mix each image of a global batch, and its label, with those of its partner.

The order of samples is random already, so neighbours are partners: places 2k and 2k + 1, counted from the start of the
global batch; the last of an odd number stays as it is. What a pair draws is keyed by (seed, epoch, the position of the
first), and both images are mixed with the same weight. So the mixed images do not depend on ranks and micro-batches: a
rank whose share begins or ends within a pair reads the partner too.

Where each sample comes R times in a row (data.repeats), partners are R places apart, in blocks of 2 R places: copies of one
sample are never mixed with each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardstep.datasets.augment.chosen import in_parts, put_rows
from shardstep.datasets.rng import Draws


@dataclass(frozen=True)
class MixedLabels:
    """Labels of mixed images: `own` with weight `weights`, `partners` with 1 - `weights`; int64, int64, float32 (batch,).

    Where images have several labels, both are shares of all classes, float32 (batch, classes).
    """

    own: Tensor
    partners: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, rows: slice | Tensor) -> "MixedLabels":
        return MixedLabels(self.own[rows], self.partners[rows], self.weights[rows])

    @property
    def heavier(self) -> Tensor:
        """The labels with the larger weight; of equal ones, the images' own. As `own`."""
        is_own = (self.weights >= 0.5).view(-1, *[1] * (self.own.ndim - 1))
        return torch.where(is_own, self.own, self.partners)


Labels = Tensor | MixedLabels
"""Labels of a batch: int64 (batch,), or shares of all classes, float32 (batch, classes); or two for each mixed image."""


def mixup(pairs: Tensor, numbers: Tensor, *, alpha: float = 0.2, probability: float = 1.0) -> tuple[Tensor, Tensor]:
    """Blend each image and label with those of its neighbour in the global batch: w x own + (1 - w) x neighbour's, with w
    from Beta(alpha, alpha). Beside cutmix, for half of the pairs. Zhang 2017, arXiv 1710.09412.

    Each pair draws its own w, where torchvision draws one per batch. Pixels are rounded to whole levels.
    """
    # Whole numbers of 16 bits: every device and any batch gives the same pixels.
    shares = (_weights(numbers, alpha, probability) * 65536).round()
    for some, share in in_parts(pairs, shares.int().to(pairs.device, non_blocking=True).view(-1, 1, 1, 1)):
        first, second = some.int().unbind(1)  # (P, H, W, C)
        moved = (first - second).mul_(share).add_(32768)
        some[:, 0] = (second << 16).add_(moved) >> 16
        some[:, 1] = (first << 16).sub_(moved).add_(65536) >> 16
    return pairs, shares / 65536


def cutmix(pairs: Tensor, numbers: Tensor, *, alpha: float = 1.0, probability: float = 1.0) -> tuple[Tensor, Tensor]:
    """Swap a random box with the image's neighbour in the global batch, and label each with both by their share of the
    area, from Beta(alpha, alpha). Beside mixup, for half of the pairs. Yun 2019, arXiv 1905.04899.

    Each pair draws its own box, as torchvision draws one per batch: around a random pixel, and clipped at the edges.
    """
    height, width = pairs.shape[2:4]
    half = 0.5 * (1 - _weights(numbers, alpha, probability)).sqrt()  # of the box's side, as a share of the image's
    row, column = (numbers[:, 2] * height).long(), (numbers[:, 3] * width).long()  # of the box's centre
    half_height, half_width = (half * height).long(), (half * width).long()
    top, left = (row - half_height).clamp(min=0), (column - half_width).clamp(min=0)
    bottom, right = (row + half_height).clamp(max=height), (column + half_width).clamp(max=width)
    for pair, *edges in zip(pairs, *(edge.tolist() for edge in (top, bottom, left, right)), strict=True):
        box = pair[:, slice(*edges[:2]), slice(*edges[2:])]
        box.copy_(box.flip(0))
    return pairs, 1 - ((bottom - top) * (right - left)).double() / (height * width)


MIXERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {function.__name__: function for function in (mixup, cutmix)}
"""Mixers by name: pairs of images, uint8 (pairs, 2, height, width, channels), and uniform numbers, float64 (pairs, 4) on the
host, in; the pairs, mixed in place, and the weights of the images' own labels, float64 (pairs,) on the host, out."""


class Mixing:
    """The mixup and cutmix of a recipe. With both, each pair is given to one of them at equal odds."""

    def __init__(self, sections: Sequence[dict[str, Any]], distance: int = 1):
        """
        Args:
            sections: those of the recipe's checked data.augment that name a mixer.
            distance: between the places of partners: how often each sample comes in a row.
        """
        self.distance = distance
        self._mixers = [
            partial(MIXERS[section["name"]], **{key: section[key] for key in section if key != "name"})
            for section in sections
        ]

    def __call__(self, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, MixedLabels]:
        """Mix images, uint8 (batch, height, width, channels), and labels, int64 (batch,). May change its input.

        The first is at a place of its global batch where a block of partners begins: an even one for neighbours.
        """
        if self.distance == 1:
            return self._mix_neighbours(images, labels, draws, len(images) // 2)
        rows, pairs = _partners_as_neighbours(len(images), self.distance)
        on_device = rows.to(images.device, non_blocking=True)
        back = on_device.argsort()
        paired = draws.of_rows(rows[: 2 * pairs])
        images, mixed = self._mix_neighbours(images[on_device], labels[on_device], paired, pairs)
        return images[back], mixed[back]

    def _mix_neighbours(
        self, images: Tensor, labels: Tensor, draws: Draws, num_pairs: int
    ) -> tuple[Tensor, MixedLabels]:
        """Mix the first pairs of neighbours, and leave the other images as they are."""
        size = len(images)
        pairs = images[: 2 * num_pairs].unflatten(0, (num_pairs, 2))
        numbers = draws.of_pairs().uniform_on_host(columns=5)
        turns = (numbers[:, 4] * len(self._mixers)).long()
        weights = torch.empty(num_pairs, dtype=torch.float64)
        for turn, mixer in enumerate(self._mixers):
            rows = (turns == turn).nonzero()[:, 0]
            on_device = rows.to(images.device, non_blocking=True)
            mixed, weights[rows] = mixer(pairs.index_select(0, on_device), numbers[rows])
            put_rows(pairs, on_device, mixed)
        each = torch.cat([weights.repeat_interleave(2), torch.ones(size - 2 * num_pairs)]).float()
        places = torch.arange(size)
        partners = torch.where(places < 2 * num_pairs, places ^ 1, places)  # those without a partner are their own
        on_device = partners.to(images.device, non_blocking=True)
        return images, MixedLabels(labels, labels[on_device], each.to(images.device, non_blocking=True))


def with_partners(start: int, stop: int, size: int, distance: int = 1) -> tuple[int, int]:
    """Widen places [start, stop) of a global batch of `size` samples, so that it holds the partner of each.

    Partners are `distance` apart, in blocks of twice that. Places 3, 4 and 5 of 10 need 2 as well, [2, 6); place 8 of 9 has
    no partner. An empty range stays empty.
    """
    block = 2 * distance
    return (start, stop) if start == stop else (start - start % block, min(-(-stop // block) * block, size))


def _partners_as_neighbours(size: int, distance: int) -> tuple[Tensor, int]:
    """Return the places of a batch in an order where partners are neighbours, int64 (size,), and the number of pairs.

    Places without a partner come last: 0 3 1 4 2 for 5 places at a distance of 3.
    """
    places = torch.arange(size)
    firsts = places[(places % (2 * distance) < distance) & (places + distance < size)]
    paired = torch.stack([firsts, firsts + distance], dim=1).flatten()
    return torch.cat([paired, places[~torch.isin(places, paired)]]), len(firsts)


def _weights(numbers: Tensor, alpha: float, probability: float) -> Tensor:
    """Return weights from Beta(alpha, alpha), by its inverse distribution function; 1 for the pairs that are not mixed."""
    from scipy.special import betaincinv  # here: the import takes a quarter of a second

    weights = torch.from_numpy(betaincinv(alpha, alpha, numbers[:, 1].numpy()))
    return weights.where(numbers[:, 0] < probability, 1.0)
