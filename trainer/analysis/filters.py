"""Draw the weights of a model's first layer, a picture for each unit."""

import numpy as np
import torch
from torch import Tensor, nn

MOST_FILTERS = 64


def first_filters(module: nn.Module, image_shape: tuple[int, int, int]) -> np.ndarray | str:
    """Return the weights of the first layer as pictures, of its first units if there are many.

    Args:
        image_shape: (height, width, channels) of the images that the model takes.

    Returns:
        uint8 (units, height, width, 1 or 3): middle grey is 0, each unit has its own scale. Or the reason why there are none.
    """
    layer = next((layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None), None)
    height, width, channels = image_shape
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        weights = layer.weight
    elif isinstance(layer, nn.Linear) and layer.in_features == height * width * channels:
        weights = layer.weight.view(-1, channels, height, width)  # the models flatten (B, C, H, W)
    else:
        return f"the first layer is a {type(layer).__name__}, whose weights are not images" if layer else "no weights"
    if weights.shape[1] not in (1, 3):
        return f"the first layer takes {weights.shape[1]} channels, which are not colors"
    return _pictures(weights.detach()[:MOST_FILTERS].float().cpu())


def _pictures(weights: Tensor) -> np.ndarray:
    largest = weights.abs().amax(dim=(1, 2, 3), keepdim=True)
    values = 0.5 + 0.5 * weights / torch.where(largest > 0, largest, 1.0)
    pixels = (255 * values).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (U, C, h, w) -> (U, h, w, C)
