"""Pictures: curves, confusion matrix, grids of images with captions. Names in them are text: see drawable."""

import io
import json
import math
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageFont
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file, write_atomically
from shardstep.configs.schema import Recipe
from shardstep.configs.text import printable
from shardstep.trainer.monitoring.status import evaluated_on

FORMATS = ("png", "jpg", "jpeg", "pdf", "svg", "webp")
_DPI = 120
GRID_ROWS, GRID_COLUMNS = 4, 8  # of the test images of a finished run
_MOST_NAMED_CLASSES = 30  # more class names than this do not fit along an axis
_LONGEST_NAME = 24  # average letters
_AVERAGE_WIDTH = 60  # of letters at a size of 100
_LEFT_TO_RIGHT = "\u200e"  # a mark that has no width
_MOST_LINES = 4  # of a caption with several labels
_OWN_FONT = "DejaVu Sans"  # comes with matplotlib
_CAPTION_SIZE, _SMALLEST_SIZE = 8, 4  # points
_CELLS_TOGETHER, _WIDEST_CELL = 15.0, 3.0  # inches: a row of a grid, and one of few images


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
        fonts = fonts_for("".join(names))
        axis.set_xticks(range(len(classes)), names, rotation=45, ha="right", family=fonts)
        axis.set_yticks(range(len(classes)), names, family=fonts)
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


def draw_seen_images(
    trained: np.ndarray,
    evaluated: np.ndarray,
    labels: list[dict[str, float]],
    positions: list[int],
    epoch: int,
    picture: Path,
) -> None:
    """Draw images (N, H, W, C) uint8 as training reads them, each above the same sample as evaluation reads it.

    Args:
        labels: the shares of classes by name, see label_texts.
        positions: of the samples in the epoch, as many as images.
    """
    captions = []
    for position, shares in zip(positions, labels, strict=True):
        lines = label_texts(shares, drawable)
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES - 1 :] = [f"and {len(lines) - _MOST_LINES + 1} more"]
        captions.append("\n".join([f"{position}: {lines[0]}", *lines[1:]]))
    (height, width), (own_height, own_width) = trained.shape[1:3], evaluated.shape[1:3]
    title = (
        f"Above: epoch {epoch} by position, as training reads it ({width}x{height} pixels).\n"
        f"Below: the same samples as evaluation reads them ({own_width}x{own_height})."
    )
    draw_grid(trained, captions, picture, below=evaluated, title=title)


def label_texts(shares: dict[str, float], show: Callable[[str], str] = printable) -> list[str]:
    """Return a text for each class of an image: its name, shown like that, and its share if that is less than 1.

    A share that would be 0.0% is left out.
    """
    texts = {name: f"{share:.1%}" for name, share in shares.items()}
    shown = {name: "" if text == "100.0%" else f" {text}" for name, text in texts.items() if text != "0.0%"}
    return [show(name) + text for name, text in shown.items()] or ["none"]


def draw_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    picture: Path,
    colors: Sequence[str] = (),
    below: Sequence[np.ndarray] | np.ndarray = (),
    title: str = "",
) -> None:
    """Draw images (H, W, C) uint8 in rows, each below its caption, in its color or in black; with `below`, above another.

    A caption that is wider than its image's cell is drawn smaller.

    Raises:
        OSError: the picture cannot be written.
    """
    plt = pyplot()
    rows = math.ceil(len(images) / GRID_COLUMNS)
    columns = min(len(images), GRID_COLUMNS)
    cell = min(_CELLS_TOGETHER / columns, _WIDEST_CELL)
    gap, line = 0.1, 1.25 * _CAPTION_SIZE / 72  # all lengths in inches
    side = cell - gap  # of the square that an image fits into
    lines = max(caption.count("\n") + 1 for caption in captions)
    pairs = [[image] for image in images] if len(below) == 0 else list(zip(images, below, strict=True))
    depths = [max(side * _fitted(image)[0] + gap for image in layer) for layer in zip(*pairs, strict=True)]
    top, height = (
        (title.count("\n") + 2) * line if title else 0,
        gap + lines * line + sum(depths),
    )  # of the title, of a row
    figure = plt.figure(figsize=(columns * cell, top + rows * height), dpi=_DPI)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns * cell), ylim=(top + rows * height, 0))
    axis.axis("off")
    _narrowed(axis.text(gap, gap, title, va="top", fontsize=_CAPTION_SIZE), columns * cell - 2 * gap)
    for place, (layers, caption) in enumerate(zip(pairs, captions, strict=True)):
        row, column = divmod(place, GRID_COLUMNS)
        middle, base = (column + 0.5) * cell, top + row * height + gap + lines * line
        style = {"color": colors[place] if colors else "black", "fontsize": _CAPTION_SIZE, "family": fonts_for(caption)}
        _narrowed(axis.text(middle, base - 0.3 * line, caption, ha="center", va="bottom", **style), side)
        for image, depth in zip(layers, depths, strict=True):
            tall, broad = (side * share for share in _fitted(image))
            shown = image.squeeze(-1) if image.shape[2] == 1 else image
            extent = (middle - broad / 2, middle + broad / 2, base + tall, base)
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
            base += depth
    axis.set(xlim=(0, columns * cell), ylim=(top + rows * height, 0))  # imshow has changed them
    _save(figure, picture)


def _narrowed(text: Any, width: float) -> None:
    """Make matplotlib's text smaller until it is no wider than that many inches. Hinting makes widths uneven."""
    with _without_font_warnings():
        while text.get_window_extent().width > width * _DPI and text.get_fontsize() > _SMALLEST_SIZE:
            text.set_fontsize(text.get_fontsize() - 0.25)


def _fitted(image: np.ndarray) -> tuple[float, float]:
    """Return the height and the width of an image, its longer side being 1."""
    height, width = image.shape[:2]
    return height / max(height, width), width / max(height, width)


def check_picture(option: str, path: Path) -> None:
    """Check before the work starts that the picture of an option can be written.

    Raises:
        InputError: its name says no format, `path` is a folder, or its folder does not exist.
    """
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise InputError(f"{option}={path} must end in one of {', '.join(FORMATS)}")
    check_output_file(option, path)


def drawable(name: str, keep: Literal["start", "end"] = "start") -> str:
    """Return a name as text for matplotlib: on one line, shortened, and a `$` in it does not begin a formula."""
    text = printable(name)
    if sum(map(_width, text)) > _LONGEST_NAME:
        letters = text if keep == "start" else text[::-1]
        short = "".join(letters[: bisect_left(list(accumulate(map(_width, letters))), _LONGEST_NAME)])
        text = short + "…" if keep == "start" else "…" + short[::-1]
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
        text = f"{_LEFT_TO_RIGHT}{text}{_LEFT_TO_RIGHT}"  # what stands beside the name stays on its side
    return text.replace("$", r"\$")


@cache
def _width(letter: str) -> float:
    """Return the width of a letter, 1 for an average one; about, if matplotlib's own font lacks it."""
    if unicodedata.combining(letter):
        return 0.0
    if ord(letter) not in _characters(_own_font_file()):
        return 2.0 if unicodedata.east_asian_width(letter) in "FW" else 1.0
    return ImageFont.truetype(_own_font_file(), 100).getlength(letter) / _AVERAGE_WIDTH


def fonts_for(text: str) -> list[str]:
    """Return the families of fonts that together have the characters of a text, the first that has one first.

    Beside matplotlib's own, they are fonts of this machine, as few as possible; see also undrawable.
    """
    return [_OWN_FONT, *_more_fonts(frozenset(map(ord, text)) - _characters(_own_font_file()) - {ord("\n")})[0]]


def undrawable(texts: Iterable[str]) -> str:
    """Return the characters that no font of this machine has; they are drawn as boxes."""
    characters = frozenset(map(ord, "".join(texts))) - _characters(_own_font_file())
    return "".join(map(chr, sorted(_more_fonts(characters)[1])))


@cache
def _more_fonts(characters: frozenset[int]) -> tuple[list[str], frozenset[int]]:
    """Return fonts that together have these characters, as far as there are any, and the characters that are left."""
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    families = []
    while characters:
        best = max(sorted(findSystemFonts()), key=lambda path: len(characters & _characters(path)), default="")
        if not best or not characters & _characters(best):
            break
        fontManager.addfont(best)
        families.append(FontProperties(fname=best).get_name())
        characters -= _characters(best)
    return families, characters


@cache
def _characters(font: str) -> frozenset[int]:
    """Return the characters that a file of a font has; none if matplotlib cannot draw it."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(font)
    except (RuntimeError, OSError):  # FreeType does not know the format, or the file is damaged
        return frozenset()
    return frozenset(face.get_charmap()) if face.scalable else frozenset()  # emoji in colour are pictures


def _own_font_file() -> str:
    from matplotlib.font_manager import findfont

    return str(findfont(_OWN_FONT))


@contextmanager
def _without_font_warnings() -> Iterator[None]:
    """Leave out the warnings about letters that no font here has: they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _save(figure: Any, picture: Path) -> None:
    content = io.BytesIO()
    with _without_font_warnings():
        figure.savefig(content, format=picture.suffix[1:].lower(), dpi=_DPI)
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
