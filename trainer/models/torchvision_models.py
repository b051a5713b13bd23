"""Every classifier of torchvision by name, adapted to the data set's image size, channels and classes."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.file_lock import file_lock
from shardstep.configs.files import file_sha256
from shardstep.datasets.cache import cache_folder
from shardstep.trainer.models import TORCHVISION
from shardstep.trainer.models.layers import Activation, Pool, Pooling, activation_layer

SMALL = 64  # pixels a side: below, a first layer for images of 224 pixels discards too much
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_SIDES = (16, 24, 32, 48, 64, 75, 80, 96, 112, 128, 160, 192, 224, 256, 299, 384, 512)  # tried for the error message

# torchvision's densenet weights have the old names of renamed layers: norm.1 is norm1
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")

Stem = Literal["auto", "imagenet", "cifar"]


def torchvision_models() -> dict[str, Callable[..., nn.Module]]:
    """Return builders of all torchvision classifiers, by `torchvision/<name>`."""
    names = torchvision.models.list_models(module=torchvision.models)
    return {TORCHVISION + name: _with_heads(name) if name in _WITH_AUXILIARY_HEADS else _plain(name) for name in names}


def _plain(name: str) -> Callable[..., nn.Module]:
    def build(
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        pretrained: bool | str = False,
        stem: Stem = "auto",
        activation: Activation | None = None,
        negative_slope: float | None = None,
        pooling: Pooling | None = None,
        dropout: float | None = None,
    ) -> nn.Module:
        """Build a classifier: (B, C, H, W) -> (B, num_classes).

        Args:
            pretrained: whether weights are loaded into it afterwards, see models.COMMON_OPTIONS.
            stem: cifar: the first convolution is 3x3 with stride 1, and no pooling follows it; imagenet: torchvision's; auto:
                cifar for images of up to 64 pixels, unless pretrained.
            activation: replaces the model's activation layers; `negative_slope` goes with leaky_relu. Function calls, like
                the last ReLU of a densenet, are not replaced.
            pooling: replaces the model's max-pooling layers, but not function calls.
            dropout: share that each of the model's dropout layers drops in training; null keeps the model's values.

        Raises:
            ValueError: an option has no effect, or the images are too small.
        """
        net = _fitted(name, image_shape, num_classes, bool(pretrained), stem)
        _replace(name, net, activation, negative_slope, pooling, dropout)
        if activation is not None and refusal(net, image_shape, backward=True):
            raise ValueError(f"activation={activation} cannot be used: {name} changes in place what its gradient needs")
        return net

    return build


def _with_heads(name: str) -> Callable[..., nn.Module]:
    def build(
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        pretrained: bool | str = False,
        stem: Stem = "auto",
        pooling: Pooling | None = None,
        dropout: float | None = None,
        auxiliary_weight: float = 0.3,
        transform_input: bool | None = None,
    ) -> nn.Module:
        """Build a classifier like the others; in training it returns (B, num_classes) of the main and each auxiliary head.

        auxiliary_weight: weight of the auxiliary heads' losses (Szegedy et al. 2014, arXiv 1409.4842, section 5: 0.3). With 0
            there are no such heads, and smaller images fit.
        transform_input: undo ImageNet's normalisation, which torchvision's weights need; null: only with pretrained=true.
        """
        net = _fitted(name, image_shape, num_classes, bool(pretrained), stem, with_heads=auxiliary_weight > 0)
        vars(net)["transform_input"] = pretrained is True if transform_input is None else transform_input
        _replace(name, net, None, None, pooling, dropout)
        return net

    return build


def downloaded_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's weights of a model, or find them where torch keeps them; by the names of a new model.

    Raises:
        InputError: they are not available.
    """
    bare = name.removeprefix(TORCHVISION)
    weights = torchvision.models.get_model_weights(bare).DEFAULT
    kept = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    digest = re.search(r"-([0-9a-f]{8,})\.", kept.name)
    try:
        with file_lock(cache_folder() / "weights"):  # one download per node; torch keeps the file
            if kept.is_file() and digest and not file_sha256(kept).startswith(digest[1]):
                kept.unlink()  # torch checks the hash only while it downloads
            found = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        also = " with model.transform_input=true" if bare in _WITH_AUXILIARY_HEADS else ""
        raise InputError(
            f"model.pretrained=true: the weights of {name} cannot be downloaded from {weights.url} ({error}). Download them "
            f"where there is a network and give model.pretrained=PATH{also}, or train from new weights with "
            f"model.pretrained=false"
        ) from None
    return with_new_names(found)


def with_new_names(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of today's torchvision; files of its first densenets have older ones."""
    return {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in found.items()}


def misfit_cause(name: str, pretrained: bool | str) -> str:
    """Say what is usually the matter if weights of one of these models do not fit."""
    if pretrained is not True:
        return "Weights from a run on small images need model.stem=cifar; others need the image size of their training"
    weights = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT
    return f"They were trained on images of {weights.transforms().crop_size[0]} pixels: give data.resize"


def _fitted(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    pretrained: bool,
    stem: Stem,
    with_heads: bool = False,
) -> nn.Module:
    """Build a model for these images, with initial weights."""
    _, height, width = image_shape
    small = stem == "cifar" or (stem == "auto" and max(height, width) <= SMALL and not pretrained)
    try:
        net = _build(name, image_shape, num_classes, pretrained, with_heads)
        changed = _use_small_stem(net) if small else False
        reason = refusal(net, image_shape)
    except ValueError as error:  # torchvision's: a transformer whose patches do not fit
        net, changed, reason = nn.Identity(), True, _first_sentence(error)
    if reason is not None:
        best = next((side for side in _SIDES if _takes(name, side, small, with_heads)), None)
        remedy = f"give data.resize={best}" if best else "use another model"
        raise ValueError(f"images of {width}x{height} pixels do not fit ({reason}): {remedy}")
    if stem == "cifar" and not changed:
        raise ValueError("stem=cifar has no effect: the first layer has stride 1, or cuts the image into patches")
    return net


def _build(
    name: str, image_shape: tuple[int, int, int], num_classes: int, pretrained: bool, with_heads: bool
) -> nn.Module:
    channels, height, width = image_shape
    options: dict[str, object] = {}
    if name in _WITH_AUXILIARY_HEADS:
        options = {"aux_logits": with_heads, "init_weights": True, "transform_input": False}
    elif name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        if height != width or height % patch:
            raise ValueError(f"it needs square images whose side is a multiple of {patch} pixels")
        options = {"image_size": height}
    elif name.startswith("maxvit"):
        options = {"input_size": (height, width)}
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        if pretrained and name in _WITH_AUXILIARY_HEADS:
            raise ValueError("its pretrained weights need images of 3 channels")
        first, conv = _convolutions(net)[0]
        net.set_submodule(first, _like(conv, channels, conv.kernel_size, conv.stride, conv.padding))
    return net


def _use_small_stem(net: nn.Module) -> bool:
    """Change the first layers to keep the resolution of small images; return whether there was something to change."""
    (first, conv), *rest = _convolutions(net)
    if max(conv.stride) == 1 or conv.stride == conv.kernel_size:
        return False
    net.set_submodule(first, _like(conv, conv.in_channels, (3, 3), (1, 1), (1, 1)))
    names = [name for name, _ in net.named_modules()]
    for name in names[names.index(first) : names.index(rest[0][0])]:
        if isinstance(net.get_submodule(name), nn.MaxPool2d):
            net.set_submodule(name, nn.Identity())
    return True


def _replace(
    name: str,
    net: nn.Module,
    activation: Activation | None,
    negative_slope: float | None,
    pooling: Pooling | None,
    dropout: float | None,
) -> None:
    modules = list(net.named_modules())
    activations = [place for place, module in modules if isinstance(module, _ACTIVATIONS)]
    pools = [(place, module) for place, module in modules if isinstance(module, nn.MaxPool2d)]
    dropouts = [module for _, module in modules if isinstance(module, nn.Dropout)]
    options = (("activation", activation, activations), ("pooling", pooling, pools), ("dropout", dropout, dropouts))
    for option, value, found in options:
        if value is not None and not found:
            raise ValueError(f"{option}={value} has no effect: {name} has no such layer")
    if negative_slope is not None and activation is None:
        raise ValueError("negative_slope belongs to activation=leaky_relu and has no effect without it")
    if activation is not None:
        for place in activations:
            net.set_submodule(place, activation_layer(activation, negative_slope))
    if pooling is not None:
        for place, pool in pools:
            sizes = (pool.kernel_size, pool.stride, pool.padding)
            side, stride, padding = (size if isinstance(size, int) else size[0] for size in sizes)
            net.set_submodule(place, Pool(pooling, side, stride, padding, pool.ceil_mode))
    for module in dropouts:
        module.inplace = module.inplace and activation is None  # it would overwrite what some activations keep
        module.p = module.p if dropout is None else dropout


def refusal(net: nn.Module, image_shape: tuple[int, int, int], backward: bool = False) -> str | None:
    """Return why a model cannot train on images of this shape; None if it can. Computes only shapes, on the meta device."""
    tensors = {key: tensor.detach().to("meta") for key, tensor in [*net.named_parameters(), *net.named_buffers()]}
    for key, _ in net.named_parameters():
        tensors[key].requires_grad_(backward)
    try:
        with torch.device("meta"), torch.set_grad_enabled(backward):
            outputs = torch.func.functional_call(net.train(), tensors, (torch.zeros(2, *image_shape),))
            if backward:
                outputs.sum().backward()
    except (RuntimeError, ValueError, AssertionError) as error:
        return _first_sentence(error)
    return None


def _first_sentence(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().split(". ")[0]


def _takes(name: str, side: int, small: bool, with_heads: bool) -> bool:
    shape = (3, side, side)
    try:
        with torch.device("meta"):  # without memory and initial weights
            net = _build(name, shape, 10, pretrained=False, with_heads=with_heads)
    except NotImplementedError:  # regnets need real weights
        net = _build(name, shape, 10, pretrained=False, with_heads=with_heads)
    except ValueError:
        return False
    if small and side <= SMALL:
        _use_small_stem(net)
    return refusal(net, shape) is None


def _convolutions(net: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]


def _like(conv: nn.Conv2d, channels: int, size: Any, stride: Any, padding: Any) -> nn.Conv2d:
    """Build a new convolution that replaces another. He et al. 2015, arXiv 1502.01852, equation 14 over the outputs."""
    made = nn.Conv2d(channels, conv.out_channels, size, stride, padding, bias=conv.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made
