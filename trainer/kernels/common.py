"""What methods for convolutions share."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module


def channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), contiguous; without a copy where memory has that order."""
    return images.permute(0, 2, 3, 1).contiguous()


def format_of(images: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which torch would convolve on a CPU, under autocast or because all is in it; None: in none."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype if images.dtype == weight.dtype else None


def refuse_second_derivatives(method: str) -> None:
    """In a backward pass that knows nothing of how its gradients depend on images and weights."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"train.convolutions={method}: its gradients have no gradients themselves; use train.convolutions=direct"
        )


def is_watched(*layers: nn.Module) -> bool:
    """Whether somebody looks at what goes into layers or comes out of them, or has given one a forward pass of its own."""
    own = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = any(getattr(layer, hooks) for layer in layers for hooks in own) or module._has_any_global_hook()
    return hooked or any("forward" in vars(layer) for layer in layers)
