"""Test-time augmentation: a model's outputs as the mean over several views of each image."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.configs.schema import Views

_SHIFT = 1  # pixels


def predict(model: nn.Module, images: Tensor, views: Views, sure_above: float | None = None) -> Tensor:
    """Compute the outputs (B, K) of a model in evaluation mode, as the mean over the views of each image.

    plain: the image. mirror: the image and its mirror image. mirror_translate: these, and both shifted a pixel up and left,
    and down and right, where the shifted ones have half the weight (Jordan 2024, arXiv 2404.00498, section 3.5).

    Args:
        images: (B, C, H, W), normalised.
        sure_above: images whose plain view gives a class at least this probability get no further views.
    """
    outputs = model(images).float()
    if views == "plain" or len(images) == 0:
        return outputs
    if sure_above is None:
        return _all_views(model, images, outputs, views)
    unsure = (outputs.softmax(dim=1).amax(dim=1) < sure_above).nonzero()[:, 0]
    if len(unsure):
        outputs[unsure] = _all_views(model, images[unsure], outputs[unsure], views)
    return outputs


def _all_views(model: nn.Module, images: Tensor, plain: Tensor, views: Views) -> Tensor:
    centred = (plain + model(images.flip(3)).float()) / 2
    if views == "mirror":
        return centred
    height, width = images.shape[2:]
    padded = functional.pad(images, (_SHIFT,) * 4, mode="reflect")
    shifted = torch.zeros_like(centred)
    for start in (0, 2 * _SHIFT):
        view = padded[:, :, start : start + height, start : start + width]
        shifted += (model(view).float() + model(view.flip(3)).float()) / 4
    return (centred + shifted) / 2
