"""The documents' recurrent network, which reads an image row by row."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from shardstep.trainer.models.layers import Activation, OutputActivation, activation_layer, output_layer

Cell = Literal["rnn", "lstm", "gru"]
_CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """Recurrent network: (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, cell: nn.RNNBase, head: nn.Module):
        super().__init__()
        self.cell, self.head = cell, head

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, C, H, W) -> (B, H, W C): a sequence of H rows
        states, _ = self.cell(rows)  # (B, H, hidden)
        return self.head(states[:, -1])


def recurrent(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    cell: Cell = "lstm",
    hidden: int = 128,
    layers: int = 1,
    head: int = 64,
    activation: Activation = "relu",
    negative_slope: float | None = None,
    dropout: float = 0.0,
    output_activation: OutputActivation = "none",
) -> nn.Module:
    """Recurrent layers over the rows of an image; linear layers turn the last state into (B, num_classes).

    Args:
        cell: rnn (Elman, with tanh), lstm or gru.
        hidden: units of the state.
        layers: recurrent layers, one on top of the other.
        head: units of the hidden linear layer.
        activation: after the hidden linear layer.
        dropout: share of the hidden linear layer's units that is dropped in training.
    """
    channels, _, width = image_shape
    return Recurrent(
        _CELLS[cell](width * channels, hidden, num_layers=layers, batch_first=True),
        nn.Sequential(
            nn.Linear(hidden, head),
            activation_layer(activation, negative_slope),
            nn.Dropout(dropout),
            nn.Linear(head, num_classes),
            output_layer(output_activation),
        ),
    )
