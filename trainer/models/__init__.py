"""Models by name. A model is a function of (image_shape, num_classes); its keyword arguments are its recipe options."""

from collections.abc import Callable
from typing import Any

from torch import nn

from shardstep.configs.errors import InputError
from shardstep.trainer.models.article_cnn import article_cnn
from shardstep.trainer.models.mlp import mlp
from shardstep.trainer.models.sync_batch_norm import convert_batch_norm
from shardstep.trainer.models.whitening_cnn import whitening_cnn

MODELS: dict[str, Callable[..., nn.Module]] = {
    "article_cnn": article_cnn,
    "mlp": mlp,
    "whitening_cnn": whitening_cnn,
}

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {"sync_batch_norm": (bool, False)}
"""Options of every model: type and default. sync_batch_norm: batch statistics over all ranks, not over each alone."""


def build_model(section: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the model that a checked recipe section names.

    Args:
        section: `name` and options.
        image_shape: (channels, height, width).
        num_classes: number of outputs.

    Raises:
        InputError: an option does not fit the others, or the images do not fit the model.
    """
    options = {key: value for key, value in section.items() if key not in ("name", *COMMON_OPTIONS)}
    try:
        model = MODELS[section["name"]](image_shape, num_classes, **options)
    except ValueError as error:
        raise InputError(f"model.name={section['name']}: {error}") from None
    if section["sync_batch_norm"]:
        converted = convert_batch_norm(model)
        if not converted:
            raise InputError(f"model.sync_batch_norm=true has no effect: {section['name']} has no batch norm")
    return model
