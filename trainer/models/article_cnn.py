"""The article's Net: four convolutions without padding, global pooling, two linear layers."""

from torch import nn

from shardstep.trainer.models.layers import (
    Activation,
    GlobalPool,
    OutputActivation,
    Pooling,
    activation_layer,
    check_size,
    output_layer,
)

_CHANNELS = (64, 128, 128, 64)


def article_cnn(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    activation: Activation = "relu",
    negative_slope: float | None = None,
    pooling: Pooling = "avg",
    dropout: float = 0.1,
    output_activation: OutputActivation = "none",
) -> nn.Module:
    """3x3 convolutions 64-128-128-64, global pooling, linear 64-32-classes: (B, C, H, W) -> (B, num_classes).

    Args:
        image_shape: (channels, height, width), at least 9x9 pixels: each convolution removes two.
        num_classes: number of outputs.
        activation: after each convolution and the first linear layer; `negative_slope` goes with leaky_relu.
        pooling: over all positions of a channel.
        dropout: share of the 32 hidden units that is dropped in training.
        output_activation: none gives logits.

    Raises:
        ValueError: the images are too small.
    """
    check_size(image_shape, 2 * len(_CHANNELS) + 1)
    channels = image_shape[0]
    layers: list[nn.Module] = []
    for outputs in _CHANNELS:
        layers += [nn.Conv2d(channels, outputs, kernel_size=3), activation_layer(activation, negative_slope)]
        channels = outputs
    return nn.Sequential(
        *layers,
        GlobalPool(pooling),  # (B, 64, H - 8, W - 8) -> (B, 64)
        nn.Linear(channels, 32),
        activation_layer(activation, negative_slope),
        nn.Dropout(dropout),
        nn.Linear(32, num_classes),
        output_layer(output_activation),
    )
