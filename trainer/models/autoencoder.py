"""The documents' autoencoder: convolutions reduce an image to a code, transposed convolutions reconstruct it."""

from itertools import pairwise

from torch import Tensor, nn

from shardstep.trainer.models.layers import Activation, activation_layer, check_size


class Autoencoder(nn.Module):
    """Autoencoder: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, widths: tuple[int, ...], activation: Activation, negative_slope: float | None, dropout: float):
        """`widths`: channels of the image and of each halved feature map; the last is the code."""
        super().__init__()
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1) for a, b in steps)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, kernel_size=3, stride=2, padding=1) for a, b in reversed(steps)
        )
        self.activation = activation_layer(activation, negative_slope)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        features, sizes = images, []
        for convolution in self.down:
            sizes.append(features.shape[2:])
            features = self.activation(convolution(features))  # height and width halve, rounded up
        features = self.dropout(features)
        for place, convolution in enumerate(self.up):
            if place:
                features = self.activation(features)
            features = convolution(features, output_size=sizes.pop())
        return features


def autoencoder(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: tuple[int, ...] = (32, 64, 16),
    activation: Activation = "relu",
    negative_slope: float | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Reconstruct images through a code, with 3x3 convolutions of stride 2: (B, C, H, W) -> (B, C, H, W).

    Train it with loss.name=mse or l1, on normalised images. The classes are not used.

    Args:
        widths: channels after each halving; a 32x32 image becomes a code of 16 x 4 x 4 numbers.
        activation: after each convolution but the last.
        dropout: share of the code that is dropped in training.

    Raises:
        ValueError: the images are too small.
    """
    if not widths:
        raise ValueError("widths must have at least one entry")
    check_size(image_shape, 2 ** len(widths))
    return Autoencoder((image_shape[0], *widths), activation, negative_slope, dropout)
