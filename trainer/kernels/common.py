"""Helpers that the convolution methods share."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module


def channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), contiguous; without a copy if memory already has that order."""
    return images.permute(0, 2, 3, 1).contiguous()


def compute_dtype(images: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype in which torch would convolve on a CPU: autocast's or a common one; None if there is none."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype if images.dtype == weight.dtype else None


def refuse_second_derivatives(method: str) -> None:
    """Raise if a backward pass is to be differentiated, which these methods do not support."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"train.convolutions={method} has no second derivatives; use train.convolutions=direct"
        )


def has_hooks(*layers: nn.Module) -> bool:
    """Return whether hooks watch the inputs or outputs of layers, or a layer's forward pass has been replaced."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = any(getattr(layer, hooks) for layer in layers for hooks in kinds) or module._has_any_global_hook()
    return hooked or any("forward" in vars(layer) for layer in layers)
