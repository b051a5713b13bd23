"""The documents' convnet: two convolutions, pooling, dropout on feature maps and on hidden units."""

from torch import nn

from shardstep.trainer.models import layers


def convnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    activation: layers.Activation = "relu",
    negative_slope: float | None = None,
    pooling: layers.Pooling = "max",
    feature_dropout: float = 0.10,
    dropout: float = 0.25,
    output_activation: layers.OutputActivation = "log_softmax",
) -> nn.Module:
    """3x3 convolutions 16 and 32, 2x2 pooling, linear 64-classes: (B, C, H, W) -> (B, num_classes); at least 6x6 pixels.

    Args:
        activation: after each convolution and the first linear layer.
        pooling: of 2x2 windows.
        feature_dropout: share of the 32 feature maps that is dropped in training.
        dropout: share of the 64 hidden units that is dropped in training.

    Raises:
        ValueError: the images are too small.
    """
    channels, height, width = image_shape
    layers.check_size(image_shape, 6)
    places = ((height - 4) // 2) * ((width - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=3),
        layers.activation_layer(activation, negative_slope),
        nn.Conv2d(16, 32, kernel_size=3),
        layers.activation_layer(activation, negative_slope),
        layers.Pool(pooling, 2),  # (B, 32, H - 4, W - 4) -> (B, 32, (H - 4) // 2, (W - 4) // 2)
        nn.Dropout2d(feature_dropout),
        nn.Flatten(),
        nn.Linear(32 * places, 64),
        layers.activation_layer(activation, negative_slope),
        nn.Dropout(dropout),
        nn.Linear(64, num_classes),
        layers.output_layer(output_activation),
    )
