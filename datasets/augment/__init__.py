"""Batch transforms on uint8 pixels, on the device of the batch, and the normalisation that follows them.

A transform takes images of shape (batch, height, width, channels) and Draws, and returns images of the same shape, except
for `shrink`; it may change its input. The result for a sample depends on (seed, epoch, its global position or its id),
never on its batch or rank. Mixers (mixing.py) come after all transforms. Keyword arguments are options in a recipe:
`data.augment=[flip, {name: translate, pixels: 2}]`.

geometry.py moves pixels, color.py changes their values, occlusion.py hides some, policies.py does several things at
random. checks.py says which options are refused. The package imports datasets/rng.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from shardstep.configs.imported import call, is_import_path, load_function
from shardstep.datasets.augment.checks import augment_problems, smallest_side
from shardstep.datasets.augment.color import blur, color_jitter, grayscale
from shardstep.datasets.augment.geometry import alternating_flip, flip, random_crop, rotate, shrink, translate
from shardstep.datasets.augment.mixing import MIXERS, Labels, MixedLabels, Mixing
from shardstep.datasets.augment.normalize import Normalize, scale_and_shift
from shardstep.datasets.augment.occlusion import cutout, erasing
from shardstep.datasets.augment.policies import randaugment, trivial_augment
from shardstep.datasets.rng import Draws

__all__ = ["Labels", "MixedLabels", "Mixing", "Normalize", "augment_problems", "scale_and_shift", "smallest_side"]

Transform = Callable[[Tensor, Draws], Tensor]

TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        *(flip, alternating_flip, translate, random_crop, rotate, shrink),
        *(color_jitter, grayscale, blur),
        *(cutout, erasing),
        *(randaugment, trivial_augment),
    )
}
AUGMENTATIONS: dict[str, Callable] = TRANSFORMS | MIXERS
"""Everything that data.augment can name."""


def build_transforms(sections: Sequence[dict[str, Any]]) -> list[Transform]:
    """Build the transforms of a recipe's checked data.augment."""
    return [
        partial(_function(section["name"]), **{key: section[key] for key in section if key != "name"})
        for section in sections
        if section["name"] in TRANSFORMS or is_import_path(section["name"])
    ]


def _function(name: str) -> Callable[..., Tensor]:
    return partial(call, f"data.augment: {name}", load_function(name)) if is_import_path(name) else TRANSFORMS[name]


def build_mixing(sections: Sequence[dict[str, Any]], distance: int = 1) -> Mixing | None:
    """Build the mixup and cutmix of a recipe's checked data.augment; partners are `distance` apart. None without any."""
    mixers = [section for section in sections if section["name"] in MIXERS]
    return Mixing(mixers, distance) if mixers else None
