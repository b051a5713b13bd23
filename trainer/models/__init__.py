"""Models by name. A builder is a function of (image_shape, num_classes); its keyword arguments are the recipe's options.

`image_shape` is (channels, height, width). Where a builder has `output_activation`, none gives logits, and log_softmax gives
log-probabilities for loss.name=nll; `negative_slope` goes with activation=leaky_relu.

The training path, analysis/ and launch/ import it. It imports distributed/, for batch norm over all ranks.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from shardstep.configs.components import options_of
from shardstep.configs.errors import InputError
from shardstep.configs.imported import build, is_import_path, with_imported
from shardstep.trainer.models.article_cnn import article_cnn
from shardstep.trainer.models.autoencoder import autoencoder
from shardstep.trainer.models.batch_norm import convert_batch_norm
from shardstep.trainer.models.convnet import convnet
from shardstep.trainer.models.mlp import mlp
from shardstep.trainer.models.perceptron import perceptron
from shardstep.trainer.models.recompute import recompute_blocks
from shardstep.trainer.models.recurrent import recurrent
from shardstep.trainer.models.whitening_cnn import whitening_cnn

_BUILDERS = (article_cnn, autoencoder, convnet, mlp, perceptron, recurrent, whitening_cnn)
TORCHVISION, TIMM = "torchvision/", "timm/"
"""What the names of these libraries' models begin with."""
MODELS: dict[str, Callable[..., nn.Module]] = {builder.__name__: builder for builder in _BUILDERS}
"""shardstep's models. Every classifier of torchvision is available, too, as torchvision/<name>."""

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {
    "pretrained": (bool | str, False), "sync_batch_norm": (bool, False), "checkpoint_activations": (bool, False),
}  # fmt: skip
"""Options of every model: type and default.

pretrained: weights to begin with: the folder of a run or of a checkpoint, or a file (.safetensors, or of torch.save); true
    downloads those of torchvision's and timm's models. A head for another number of classes is new.
sync_batch_norm: whether batch statistics are over all ranks, not per rank.
checkpoint_activations: whether what is inside the model's blocks is computed again in the backward pass, which saves memory.
"""


def models_for(name: str) -> dict[str, Callable[..., nn.Module]]:
    """Return the models to look a name up in. Libraries take seconds to import, so that happens only if needed.

    Raises:
        InputError: the library of the name is not installed.
    """
    if name in MODELS or is_import_path(name):
        return MODELS
    if name.startswith(TIMM):
        from shardstep.trainer.models.timm_models import timm_models

        return timm_models(name)
    from shardstep.trainer.models.torchvision_models import torchvision_models

    found = torchvision_models()
    return MODELS | (found if name.startswith(TORCHVISION) or any(name.lower() in known for known in found) else {})


def _in_layout_of_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make images contiguous, as code with `view` expects, unless the module was converted to channels_last."""
    images, *rest = inputs
    filters = next((value for value in module.parameters() if value.ndim == 4), None)
    is_channels_last = filters is not None and not filters.is_contiguous()
    return (images if is_channels_last else images.contiguous(), *rest)


def build_model(section: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the model of a checked recipe section.

    Raises:
        InputError: an option does not fit the others, or the images do not fit the model.
    """
    name = section["name"]
    if section.get("pretrained") == "":
        raise InputError("model.pretrained is empty: give false, true, or the path of a folder or a file")
    builder = with_imported(models_for(name), name)[name]
    options = {key: section[key] for key in options_of(builder) if key in section}
    if is_import_path(name):
        model = build(f"model.name={name}", name, image_shape, num_classes, **options)
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model.name={name} returned {type(model).__name__}: a model is a function of (image_shape, num_classes) "
                f"that returns a torch.nn.Module"
            )
        model.register_forward_pre_hook(_in_layout_of_weights)
    else:
        try:
            model = builder(image_shape, num_classes, **options)
        except ValueError as error:
            raise InputError(f"model.name={name}: {error}") from None
    converted = convert_batch_norm(model, section["sync_batch_norm"])
    if section["sync_batch_norm"] and not converted:
        raise InputError(f"model.sync_batch_norm=true has no effect: {name} has no batch norm")
    if section.get("checkpoint_activations") and not recompute_blocks(model):
        raise InputError(f"model.checkpoint_activations=true has no effect: {name} has no blocks of several layers")
    return model
