"""The blocks of a model, in the order in which it defines them: for learning rates by depth, and for recomputation."""

from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FEWEST_ALIKE = 3


def blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Return the name and module of each block.

    Containers are taken apart, and so is whatever holds a list of at least three modules of one class, as the encoder of a
    transformer does. What is left are single layers, and blocks such as those of a ResNet.
    """
    for name, child in model.named_children():
        if _holds_blocks(child):
            yield from blocks(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Return the number of the layer that each parameter belongs to, by the parameter's name, from 0.

    A layer is a block with weights of two or more dimensions, and the blocks after it that have none, such as its norm. The
    parameters of no block, such as the class token of a transformer, belong to layer 0.
    """
    numbers: dict[str, int] = {}
    number = -1
    for prefix, block in blocks(model):
        own = list(block.named_parameters(prefix))
        number += any(parameter.ndim >= 2 for _, parameter in own)
        numbers |= {name: max(number, 0) for name, _ in own}
    return {name: numbers.get(name, 0) for name, _ in model.named_parameters()}


def _holds_blocks(module: nn.Module) -> bool:
    return type(module) in _CONTAINERS or _is_list(module) or any(map(_is_list, module.children()))


def _is_list(module: nn.Module) -> bool:
    is_alike = len({*map(type, module.children())}) == 1
    return isinstance(module, _CONTAINERS) and len(module) >= _FEWEST_ALIKE and is_alike
