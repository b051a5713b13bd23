"""The article's Net: four convolutions without padding, global pooling, two linear layers."""

from torch import nn

from shardstep.trainer.models import layers

_CHANNELS = (64, 128, 128, 64)


def article_cnn(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    activation: layers.Activation = "relu",
    negative_slope: float | None = None,
    pooling: layers.Pooling = "avg",
    dropout: float = 0.1,
    output_activation: layers.OutputActivation = "none",
) -> nn.Module:
    """3x3 convolutions 64-128-128-64, global pooling, linear 64-32-classes: (B, C, H, W) -> (B, num_classes).

    Args:
        image_shape: at least 9x9 pixels: each convolution removes two.
        activation: after each convolution and the first linear layer.
        pooling: over all positions of a channel.
        dropout: share of the 32 hidden units that is dropped in training.

    Raises:
        ValueError: the images are too small.
    """
    layers.check_size(image_shape, 2 * len(_CHANNELS) + 1)
    channels = image_shape[0]
    convolutions: list[nn.Module] = []
    for outputs in _CHANNELS:
        convolutions.append(nn.Conv2d(channels, outputs, kernel_size=3))
        convolutions.append(layers.activation_layer(activation, negative_slope))
        channels = outputs
    return nn.Sequential(
        *convolutions,
        layers.GlobalPool(pooling),  # (B, 64, H - 8, W - 8) -> (B, 64)
        nn.Linear(channels, 32),
        layers.activation_layer(activation, negative_slope),
        nn.Dropout(dropout),
        nn.Linear(32, num_classes),
        layers.output_layer(output_activation),
    )
