"""A small fast network whose first layer whitens image patches, after the CIFAR-10 speed records.

Page 2018 (How to Train Your ResNet) and Jordan 2024, arXiv 2404.00498: a frozen 2x2 convolution, computed from training
images, decorrelates its inputs, so that later layers can use high learning rates from the first step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.trainer.models.layers import Activation, OutputActivation, activation_layer, check_size, output_layer

_PATCH = 2  # pixels: side of the patches that are whitened
# A CPU's caches hold the patches of 50 images of 32x32, 5 MB; a GPU is fastest on large pieces, here 0.5 GB.
_PIXELS_AT_ONCE = {"cpu": 50 * 32**2, "cuda": 5000 * 32**2}


class WhiteningConv(nn.Conv2d):
    """A frozen convolution whose filters are the scaled eigenvectors of the patches' covariance, and their negatives."""

    def __init__(self, channels: int):
        self.patch_size = channels * _PATCH**2
        super().__init__(channels, 2 * self.patch_size, kernel_size=_PATCH)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Compute the filters from normalised training images (N, C, H, W)."""
        size, count = self.patch_size, 0
        total, products = images.new_zeros(size, dtype=torch.float64), images.new_zeros(size, size, dtype=torch.float64)
        pixels = images.shape[2] * images.shape[3]
        for part in images.split(max(1, _PIXELS_AT_ONCE[images.device.type] // pixels)):
            patches = _patches(part)
            total += patches.sum(dim=1)
            products += patches @ patches.T
            count += patches.shape[1]
        mean = total / count
        covariance = products / count - mean.outer(mean)
        variances, directions = torch.linalg.eigh(covariance)  # in columns, smallest first
        # The sign of an eigenvector is arbitrary: fix it, so that all machines compute the same filters.
        directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
        filters = (directions / (variances + epsilon).sqrt()).T.flip(0).reshape(self.patch_size, -1, _PATCH, _PATCH)
        self.weight.copy_(torch.cat([filters, -filters]))


def _patches(images: Tensor) -> Tensor:
    """Return all patches of images (N, C, H, W), float64 (C x patch height x patch width, N x positions)."""
    count, channels, height, width = images.shape
    rows, columns = height - _PATCH + 1, width - _PATCH + 1
    patches = images.new_empty(channels, _PATCH, _PATCH, count, rows, columns, dtype=torch.float64)
    for down in range(_PATCH):
        for right in range(_PATCH):  # one copy per pixel of a patch: functional.unfold takes four times as long
            part = images[:, :, down : down + rows, right : right + columns]
            patches[:, down, right] = part.transpose(0, 1)
    return patches.view(channels * _PATCH**2, -1)


class Group(nn.Sequential):
    """`depth` convolutions with batch norm, and a 2x2 max pooling after the first: halves the height and width.

    From a depth of 3 on, a shortcut skips all convolutions but the first.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, activation: Activation, norm: Callable[[int], nn.Module]):
        first = [_conv(inputs, outputs), nn.MaxPool2d(2), norm(outputs), activation_layer(activation)]
        more = [_conv(outputs, outputs), norm(outputs)]
        for _ in range(depth - 2):
            more += [activation_layer(activation), _conv(outputs, outputs), norm(outputs)]
        super().__init__(*first, *([_Shortcut(*more)] if depth > 2 else more), activation_layer(activation))


class _Shortcut(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = super().forward(features)
        return features + result


class WhiteningCnn(nn.Module):
    """Whitening CNN: (B, C, H, W) -> (B, num_classes)."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        activation: Activation,
        norm: Callable[[int], nn.Module],
        output_scale: float,
        output_activation: OutputActivation,
    ):
        super().__init__()
        self.whitening = WhiteningConv(channels)
        self.activation = activation_layer(activation)
        sizes = [self.whitening.out_channels, *widths]
        self.groups = nn.Sequential(*(
            Group(inputs, outputs, depth, activation, norm)
            for inputs, outputs, depth in zip(sizes[:-1], widths, depths, strict=True)
        ))  # fmt: skip
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.output_scale = output_scale
        self.output_activation = output_layer(output_activation)

    def initialize(self, images: Tensor) -> None:
        """Set the weights that depend on the data, from normalised training images (N, C, H, W)."""
        self.whitening.whiten(images)

    def forward(self, images: Tensor) -> Tensor:
        features = self.groups(self.activation(self.whitening(images)))  # (B, widths[-1], H // 8, W // 8)
        # amax would be slower, and share the gradient among all positions with the highest value. Core ML's converter
        # does not know the default of the stride.
        size = features.shape[2:]
        highest = functional.max_pool2d(features, size, stride=size).flatten(1)  # (B, widths[-1])
        return self.output_activation(self.head(highest) * self.output_scale)


def whitening_cnn(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: tuple[int, ...] = (32, 64, 128),
    depths: tuple[int, ...] = (),
    activation: Activation = "gelu",
    norm_momentum: float = 0.4,
    norm_eps: float = 1e-5,
    norm_scale: bool = True,
    output_scale: float = 0.125,
    unit_head: bool = False,
    output_activation: OutputActivation = "none",
) -> nn.Module:
    """Frozen 2x2 whitening convolution, then one group of 3x3 convolutions per width, each halving the image.

    Args:
        widths: channels of the groups.
        depths: convolutions of the groups, 2 or more; from 3 on with a shortcut, as in Jordan's networks for 95 % and 96 %.
            By default 2 in each.
        norm_momentum: weight of the newest batch in batch norm's running statistics, as in torch.
        norm_eps: added to the variances in batch norm.
        norm_scale: whether batch norm has a trained scale, and not only a bias.
        output_scale: factor on the logits.
        unit_head: whether the last layer's initial weights have a standard deviation of 1.

    Raises:
        ValueError: the images are too small, or there are not as many depths as widths, of 2 or more each.
    """
    if not widths:
        raise ValueError("widths must have at least one entry")
    if depths and (len(depths) != len(widths) or min(depths) < 2):
        raise ValueError(f"depths must be {len(widths)} numbers of 2 or more, one for each of widths")
    check_size(image_shape, 2 ** (len(widths) + 1) + 1)  # at the end 2x2 positions: batch norm needs more than one

    def norm(channels: int) -> nn.Module:
        layer = nn.BatchNorm2d(channels, eps=norm_eps, momentum=norm_momentum)
        layer.weight.requires_grad_(norm_scale)
        return layer

    depths = depths or (2,) * len(widths)
    model = WhiteningCnn(image_shape[0], num_classes, widths, depths, activation, norm, output_scale, output_activation)
    if unit_head:
        with torch.no_grad():
            model.head.weight.div_(model.head.weight.std())
    return model


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])  # the first channels are initially an identity
    return conv
