"""Pictures of a run: curves, confusion matrix, and test images with predictions. Rank 0, after the last evaluation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shardstep.trainer.setup import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID_ROWS, GRID_COLUMNS = 4, 8
_MOST_NAMED_CLASSES = 30  # more class names than this do not fit along an axis


def draw_curves(metrics_path: Path, picture: Path) -> None:
    """Draw loss and accuracy against epochs from a metrics.jsonl."""
    plt = _pyplot()
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for kind, label, style in (("train", "training batch", {"alpha": 0.6}), ("eval", "test set", {"marker": "o"})):
            chosen = [line for line in lines if line["kind"] == kind and line[name] is not None]
            axis.plot(
                [line["epoch"] for line in chosen], [line[name] for line in chosen], label=label, markersize=4, **style
            )
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_confusion(confusion: Tensor, classes: list[str], picture: Path) -> None:
    """Draw a confusion matrix (classes, classes): rows are labels, in per cent of each label's samples."""
    plt = _pyplot()
    share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    named = len(classes) <= _MOST_NAMED_CLASSES
    size = max(5.0, 0.55 * len(classes)) if named else 9.0
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="prediction", ylabel="label")
    if named:
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        for row, values in enumerate(share.tolist()):
            for column, value in enumerate(values):
                if value >= 0.5:
                    color = "white" if value > 50 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="per cent of the label's samples", shrink=0.8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_predictions(
    pixels: Tensor,
    labels: list[int],
    predictions: list[int],
    confidences: list[float],
    classes: list[str],
    picture: Path,
) -> None:
    """Draw test images (N, H, W, C) uint8 with prediction and confidence; wrong ones are red and name the label too."""
    plt = _pyplot()
    figure, axes = plt.subplots(GRID_ROWS, GRID_COLUMNS, figsize=(13, 7.6))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.94, hspace=0.3, wspace=0.05)
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place < len(labels):
            _draw_prediction(
                axis, pixels[place].numpy(), classes[labels[place]], classes[predictions[place]], confidences[place]
            )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


@torch.no_grad()
def first_predictions(run: Run) -> tuple[Tensor, list[int], list[int], list[float]]:
    """The first test images of a run with labels, predictions and their probabilities, computed on this rank alone."""
    count = min(GRID_ROWS * GRID_COLUMNS, run.data.test.manifest.samples)
    pixels, labels = run.data.test_reader.read(np.arange(count))
    module = run.state.module.eval()
    outputs = module(run.data.normalize(pixels.to(run.accelerator.device)))
    confidence, prediction = outputs.float().softmax(dim=1).max(dim=1)
    return pixels.cpu(), labels.tolist(), prediction.tolist(), confidence.tolist()


def _draw_prediction(axis: "Axes", pixels: np.ndarray, label: str, prediction: str, confidence: float) -> None:
    axis.imshow(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
    right = label == prediction
    text = f"{prediction} {confidence:.0%}" if right else f"{prediction} {confidence:.0%}\nnot {label}"
    axis.set_title(text, fontsize=9, color="black" if right else "crimson")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, nor touched
    from matplotlib import pyplot

    return pyplot
