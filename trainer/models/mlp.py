"""The documents' SimpleNet: three linear layers with an activation between them."""

from itertools import pairwise
from math import prod

from torch import nn

from shardstep.trainer.models.layers import Activation, OutputActivation, activation_layer, output_layer


def mlp(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (128, 64),
    activation: Activation = "relu",
    negative_slope: float | None = None,
    dropout: float = 0.0,
    output_activation: OutputActivation = "none",
) -> nn.Module:
    """A multi-layer perceptron on flattened images: (B, C, H, W) -> (B, num_classes).

    Args:
        hidden: units of the hidden layers.
        activation: after each hidden layer.
        dropout: share of hidden units that is dropped in training.
        output_activation: none gives logits. The document's listing has a ReLU on the output, too, which makes negative
            logits impossible.
    """
    widths = [prod(image_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]  # (B, C, H, W) -> (B, C H W)
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation_layer(activation, negative_slope)]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes), output_layer(output_activation))
