"""A model's floating-point buffers, such as batch norm's running statistics, as one vector. They differ between ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def flatten_buffers(module: nn.Module) -> Tensor:
    """Return a copy of a model's persistent buffers, (n,), on their device."""
    found = [value.flatten() for _, value in _float_buffers(module)]
    return torch.cat(found) if found else torch.zeros(0)


def split_buffers(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """Invert flatten_buffers: return the buffers by name."""
    buffers = list(_float_buffers(module))
    parts = flat.split([value.numel() for _, value in buffers])
    return {name: part.view_as(value).clone() for (name, value), part in zip(buffers, parts, strict=True)}


def set_buffers(module: nn.Module, flat: Tensor) -> None:
    """Copy the values of such a vector into a model's buffers."""
    module.load_state_dict(split_buffers(module, flat), strict=False)


def _float_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict().keys()
    return ((name, value) for name, value in module.named_buffers() if value.is_floating_point() and name in kept)
