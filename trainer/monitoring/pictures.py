"""Pictures of a run: curves, confusion matrix, test images with predictions or reconstructions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardstep.configs.schema import Recipe

GRID_ROWS, GRID_COLUMNS = 4, 8
_MOST_NAMED_CLASSES = 30  # more class names than this do not fit along an axis


def draw_curves(metrics_path: Path, picture: Path, extras: str) -> None:
    """Draw loss and accuracy against epochs from a metrics.jsonl; `extras` are in the training loss alone."""
    plt = pyplot()
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    has_accuracy = any(line["accuracy"] is not None for line in lines)
    figure, axes = plt.subplots(1, 1 + has_accuracy, figsize=(5.5 * (1 + has_accuracy), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), ("loss", "accuracy"), strict=False):
        of_train, of_test = (f", with {extras}", ", without") if extras and name == "loss" else ("", "")
        for kind, label, style in (
            ("train", f"training batch{of_train}", {"alpha": 0.6}),
            ("eval", f"test set{of_test}", {"marker": "o"}),
        ):
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
    plt = pyplot()
    share = (100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
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
    captions = []
    for prediction, label, confidence in zip(predictions, labels, confidences, strict=True):
        mistake = "" if prediction == label else f"\nnot {classes[label]}"
        captions.append((f"{classes[prediction]} {confidence:.0%}{mistake}", "crimson" if mistake else "black"))
    _draw_grid(pixels, captions, picture)


def draw_reconstructions(originals: Tensor, reconstructions: Tensor, picture: Path) -> None:
    """Draw images (N, H, W, C) uint8, each with its reconstruction to the right of it."""
    pairs = torch.stack([originals, reconstructions], dim=1).flatten(0, 1)  # (2 N, H, W, C), in turn
    _draw_grid(pairs, [("original", "black"), ("reconstructed", "black")] * len(originals), picture)


def _draw_grid(pixels: Tensor, captions: list[tuple[str, str]], picture: Path) -> None:
    """Draw images (N, H, W, C) uint8, each below its caption and color."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(13, 8), layout="constrained")
    axis.set(xlim=(0, GRID_COLUMNS), ylim=(GRID_ROWS, 0), aspect="equal")
    axis.axis("off")
    for place, (image, (caption, color)) in enumerate(zip(pixels.numpy(), captions, strict=True)):
        row, column = divmod(place, GRID_COLUMNS)
        shown = image.squeeze(-1) if image.shape[2] == 1 else image
        extent = (column + 0.15, column + 0.85, row + 0.95, row + 0.25)  # left, right, bottom, top
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=extent)
        axis.text(column + 0.5, row + 0.22, caption, ha="center", va="bottom", fontsize=9, color=color)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, imported when the first picture is drawn."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, nor touched
    from matplotlib import pyplot

    return pyplot


def training_extras(recipe: Recipe) -> str:
    """Label smoothing and auxiliary heads, such as "label smoothing of 0.1"; empty where both losses are the same."""
    smoothing, weight = recipe.loss.get("label_smoothing"), recipe.model.get("auxiliary_weight")
    parts = [f"label smoothing of {smoothing:g}"] if smoothing else []
    parts += [f"{weight:g} times the loss of auxiliary heads"] if weight else []
    return " and ".join(parts)
