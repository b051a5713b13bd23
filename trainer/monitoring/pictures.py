"""Pictures: curves, confusion matrix, grids of images with captions. Names in them are text: see drawable."""

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardstep.configs.files import write_atomically
from shardstep.configs.schema import Recipe
from shardstep.configs.text import printable
from shardstep.trainer.monitoring.status import evaluated_on

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg", "webp")
GRID_ROWS, GRID_COLUMNS = 4, 8  # of the test images of a finished run
_MOST_NAMED_CLASSES = 30  # more class names than this do not fit along an axis
_LONGEST_NAME = 24  # characters


def draw_curves(metrics_path: Path, picture: Path, extras: str) -> None:
    """Draw loss and accuracy, or mAP, against epochs from a metrics.jsonl; only the training loss has the `extras`."""
    plt = pyplot()
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    evaluated = next((evaluated_on(line) for line in lines if line["kind"] == "eval"), "test")
    drawn = ["loss", *(name for name in ("accuracy", "map") if any(line.get(name) is not None for line in lines))]
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.5 * len(drawn), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), drawn, strict=True):
        of_train, of_test = (f", with {extras}", ", without") if extras and name == "loss" else ("", "")
        for kind, label, style in (
            ("train", f"training batch{of_train}", {"alpha": 0.6}),
            ("eval", f"{evaluated} set{of_test}", {"marker": "o"}),
        ):
            chosen = [line for line in lines if line["kind"] == kind and line.get(name) is not None]
            epochs, values = ([line[key] for line in chosen] for key in ("epoch", name))
            if chosen or name == "loss":
                axis.plot(epochs, values, label=label, markersize=4, **style)
        axis.set(xlabel="epoch", ylabel="mean average precision" if name == "map" else name)
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, picture)


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
        names = [drawable(name) for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), names)
        for row, values in enumerate(share.tolist()):
            for column, value in enumerate(values):
                if value >= 0.5:
                    color = "white" if value > 50 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="per cent of the label's samples", shrink=0.8)
    _save(figure, picture)


def draw_predictions(
    pixels: Tensor,
    labels: list[int],
    predictions: list[int],
    confidences: list[float],
    classes: list[str],
    picture: Path,
) -> None:
    """Draw test images (N, H, W, C) uint8 with prediction and confidence; mistakes are red and have the label too."""
    captions, colors = [], []
    for predicted, true, confidence in zip(predictions, labels, confidences, strict=True):
        mistake = "" if predicted == true else f"\nnot {drawable(classes[true])}"
        captions.append(f"{drawable(classes[predicted])} {confidence:.0%}{mistake}")
        colors.append("crimson" if mistake else "black")
    draw_grid(pixels.numpy(), captions, picture, colors)


def draw_found_labels(
    pixels: Tensor, labels: list[list[int]], found: list[list[int]], classes: list[str], picture: Path
) -> None:
    """Draw test images (N, H, W, C) uint8 with the labels found; where these are not those that hold, red and with both."""
    captions, colors = [], []
    for true, ours in zip(labels, found, strict=True):
        names, others = (", ".join(drawable(classes[label]) for label in some) or "none" for some in (ours, true))
        captions.append(names if ours == true else f"{names}\nis {others}")
        colors.append("black" if ours == true else "crimson")
    draw_grid(pixels.numpy(), captions, picture, colors)


def draw_reconstructions(originals: Tensor, reconstructions: Tensor, picture: Path) -> None:
    """Draw images (N, H, W, C) uint8, each with its reconstruction to the right of it."""
    pairs = torch.stack([originals, reconstructions], dim=1).flatten(0, 1)  # (2 N, H, W, C), in turn
    draw_grid(pairs.numpy(), ["original", "reconstructed"] * len(originals), picture)


def draw_grid(
    images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], picture: Path, colors: Sequence[str] = ()
) -> None:
    """Draw images (H, W, C) uint8 in rows, each below its caption, in its color or in black.

    Raises:
        OSError: the picture cannot be written.
    """
    plt = pyplot()
    rows = math.ceil(len(images) / GRID_COLUMNS)
    columns = GRID_COLUMNS if rows > 1 else max(2, len(images))
    figure, axis = plt.subplots(figsize=(1.625 * columns, 1.625 * rows), layout="constrained")
    axis.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    axis.axis("off")
    for place, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, GRID_COLUMNS)
        shown = pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels
        height, width = (0.7 * side / max(pixels.shape[:2]) for side in pixels.shape[:2])  # of a cell
        extent = (column + 0.5 - width / 2, column + 0.5 + width / 2, row + 0.25 + height, row + 0.25)
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=extent)
        color = colors[place] if colors else "black"
        middle = {"ha": "center", "va": "bottom", "fontsize": 8, "color": color}
        axis.text(column + 0.5, row + 0.22, caption, **middle)
    _save(figure, picture)


def drawable(name: str, keep: Literal["start", "end"] = "start") -> str:
    """Return a name as text for matplotlib: on one line, shortened, and a `$` in it does not begin a formula."""
    text = printable(name)
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…" if keep == "start" else "…" + text[1 - _LONGEST_NAME :]
    return text.replace("$", r"\$")


def _save(figure: Any, picture: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in letters that the font lacks are drawn as boxes
        figure.savefig(content, format=picture.suffix[1:].lower(), dpi=120)
    pyplot().close(figure)
    write_atomically(picture, content.getvalue())


def pyplot() -> Any:
    """Import matplotlib.pyplot, when the first picture is drawn."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    return pyplot


def training_extras(recipe: Recipe) -> str:
    """Say what only the training loss has, such as "label smoothing of 0.1"; empty where both losses are the same."""
    smoothing, weight = recipe.loss.get("label_smoothing"), recipe.model.get("auxiliary_weight")
    parts = [f"label smoothing of {smoothing:g}"] if smoothing else []
    parts += [f"{weight:g} times the loss of auxiliary heads"] if weight else []
    return " and ".join(parts)
