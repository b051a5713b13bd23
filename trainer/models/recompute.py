"""Keep only the inputs of a model's blocks for the backward pass, and compute what is inside them again there.

Chen et al. 2016, arXiv 1604.06174. Weights and losses stay the same bit for bit: dropout draws the same numbers again, and
batch norm counts a batch once.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from shardstep.trainer.models.blocks import blocks


class _Recomputed(nn.Module):
    """Mixed into the class of a block."""

    def forward(self, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*inputs)
        contexts = partial(_first_pass_and_second, self)
        return checkpoint(super().forward, *inputs, use_reentrant=False, context_fn=contexts)


def recompute_blocks(model: nn.Module) -> int:
    """Make the blocks of a model that have several layers with weights forget their insides; return how many there are."""
    found = [block for _, block in blocks(model) if sum(p.ndim >= 2 for p in block.parameters()) > 1]
    for block in found:
        own = type(block)
        block.__class__ = type(own.__name__, (_Recomputed, own), {})
    return len(found)


def _first_pass_and_second(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _without_counting(block)


@contextlib.contextmanager
def _without_counting(block: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics."""
    kept = [(layer, dict(layer._buffers)) for layer in block.modules() if isinstance(layer, _BatchNorm)]
    for layer, buffers in kept:
        layer._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers.update(buffers)
