"""The documents' perceptron: one linear layer."""

from math import prod

from torch import nn


def perceptron(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """One weight per value of the image and class, and a bias per class: (B, C, H, W) -> (B, num_classes).

    With loss.name=perceptron and optimizer.name=sgd this is the perceptron algorithm; for two classes,
    outputs[1] - outputs[0] is the document's w x + b, and its sign the document's label -1 or 1.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(image_shape), num_classes))
