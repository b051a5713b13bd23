"""Weights that were trained elsewhere, fitted to a model by name and shape."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.text import listed

_HOLDERS = (
    "state_dict",
    "model_state_dict",
    "model_ema",
    "model",
)  # keys of training scripts for the weights in a file
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # what wrapped the whole model when its weights were saved
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Fit:
    """What weights from elsewhere were in a model; the other tensors keep their initial values.

    Attributes:
        loaded: how many tensors they filled.
        head: tensors whose number of outputs is that of the classes, and was another one there.
        missing: tensors that they do not have.
        reshaped: tensors that have another shape there, with both shapes.
        unused: tensors of theirs that the model does not have.
    """

    loaded: int
    head: list[str]
    missing: list[str]
    reshaped: list[str]
    unused: list[str]

    @property
    def misfits(self) -> str | None:
        """Say what did not fit, but for the head; None if all did."""
        parts = [
            f"{what}: {listed(names)}"
            for what, names in (
                ("not there, so initial values stay", self.missing),
                ("of another shape there, so initial values stay", self.reshaped),
                ("there, but not in this model", self.unused),
            )
            if names
        ]
        return "; ".join(parts) or None


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a file of torch.save that holds a state_dict, by name; on the CPU.

    Raises:
        InputError: there is no such file, or it holds no weights.
    """
    if not path.is_file():
        raise InputError(f"model.pretrained={path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"model.pretrained={path} cannot be read as weights: {reason}") from None
    if isinstance(found, dict):
        found = next((found[key] for key in _HOLDERS if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"model.pretrained={path} does not hold a mapping of names to tensors (a state_dict)")
    return found


def fit_weights(net: nn.Module, found: Mapping[str, Tensor], num_classes: int, origin: str) -> Fit:
    """Load those tensors into a model that it has, in the same shape; a first layer may be for another number of channels.

    Raises:
        InputError: less than half of the model's weights are among them, so they belong to another model.
    """
    own = net.state_dict()
    found = _unwrapped(found, own)
    head: list[str] = []
    missing: list[str] = []
    reshaped: list[str] = []
    loaded, numbers = 0, 0
    for name, tensor in own.items():
        given = found.get(name)
        if given is None:
            if not name.endswith("num_batches_tracked"):
                missing.append(name)
            continue
        given = _for_channels(given, tensor)
        if given.shape == tensor.shape:
            own[name] = given
            loaded, numbers = loaded + 1, numbers + tensor.numel()
        elif given.shape[1:] == tensor.shape[1:] and len(tensor) == num_classes:
            head.append(name)
        else:
            reshaped.append(f"{name} {_size(given)} for {_size(tensor)}")
    rest = sum(tensor.numel() for name, tensor in own.items() if name not in head)
    unused = [name for name in found if name not in own]
    fit = Fit(loaded, head, missing, reshaped, unused)
    if numbers < _LEAST_SHARE * rest:
        raise InputError(f"{origin} holds weights of another model: {fit.misfits}")
    try:
        net.load_state_dict(own)
    except (RuntimeError, NotImplementedError) as error:  # sparse tensors, say
        raise InputError(f"{origin}: {str(error).splitlines()[0]}") from None
    return fit


def _unwrapped(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors by the names that they have in a model, without those of wrappers around it."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in found) and not all(name.startswith(wrapper) for name in own):
            found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def _for_channels(given: Tensor, wanted: Tensor) -> Tensor:
    """Return the filters of a first convolution for images of one channel instead of three, or the reverse.

    Grey images then give the same outputs: they have the same value in three channels.
    """
    if given.ndim == wanted.ndim == 4 and given.shape[1] == 3 and wanted.shape[1] == 1:
        return given.sum(dim=1, keepdim=True)
    if given.ndim == wanted.ndim == 4 and given.shape[1] == 1 and wanted.shape[1] == 3 and len(given) == len(wanted):
        return given.expand(-1, 3, -1, -1) / 3
    return given


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) if math.prod(tensor.shape) != 1 else "1"
