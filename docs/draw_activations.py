"""Draw docs/activations.png: every activation that models can choose, with its derivative.

python docs/draw_activations.py
"""

from pathlib import Path
from typing import get_args

import matplotlib
import torch

from shardstep.trainer.models.layers import Activation, activation_layer

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Draw the picture beside this file."""
    names = get_args(Activation)
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.6 * rows), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        x = torch.linspace(-4, 4, 401, requires_grad=True)
        # a slope that can be seen: leaky_relu's default of 0.01 looks like relu
        y = activation_layer(name, 0.1 if name == "leaky_relu" else None)(x + 0)
        (slope,) = torch.autograd.grad(y.sum(), x)
        axis.plot(x.detach(), y.detach(), label="value")
        axis.plot(x.detach(), slope, linestyle="--", linewidth=1, label="derivative")
        axis.set(title=f"{name} (negative_slope 0.1)" if name == "leaky_relu" else name, ylim=(-1.5, 3), xlim=(-4, 4))
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.axvline(0, color="grey", linewidth=0.5)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(loc="upper left", fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(Path(__file__).with_name("activations.png"), dpi=100)


if __name__ == "__main__":
    main()
