"""Predict the classes of image files with a trained model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shardstep.datasets.batches import read_ahead
from shardstep.datasets.image_files import read_image_file
from shardstep.trainer.analysis.trained_model import TrainedModel

_BATCH = 32  # files per forward pass
_WORKERS = 2


@dataclass(frozen=True)
class FilePrediction:
    """The prediction for an image file."""

    path: Path
    pixels: np.ndarray  # uint8 (height, width, channels), as the model gets them
    top: list[tuple[int, float]]  # classes and probabilities, the most probable first
    found: list[int]  # the classes from recipe's threshold on, where images have several; else the most probable


def predict_files(
    trained: TrainedModel, files: list[Path], top: int, leave_out: Callable[[Path, str], None]
) -> Iterator[FilePrediction]:
    """Predict image files, in their order; the next ones are read while the model runs.

    Args:
        trained: a model that finds one label, or several.
        top: how many classes to return for each, at most all; more where more are found.
        leave_out: called with each file that cannot be read, and why.
    """
    groups = (files[start : start + _BATCH] for start in range(0, len(files), _BATCH))
    for group in read_ahead(groups, lambda group: lambda: [(path, _read(trained, path)) for path in group], _WORKERS):
        images = []
        for path, read in group:
            if isinstance(read, str):
                leave_out(path, read)
            else:
                images.append((path, read))
        if not images:
            continue
        pixels = torch.from_numpy(np.stack([image for _, image in images]))
        with torch.inference_mode():
            outputs = trained.module(trained.normalize(pixels.to(trained.device))).float()  # (B, K)
            several = trained.objective.finds_several
            likely = outputs.sigmoid() if several else outputs.softmax(dim=1)
            shares, classes = likely.sort(dim=1, descending=True, stable=True)
            counts = (shares >= trained.recipe.eval.threshold).sum(dim=1).tolist() if several else [1] * len(images)
        rows = zip(images, classes.tolist(), shares.tolist(), counts, strict=True)
        for (path, image), row, probabilities, count in rows:
            yield FilePrediction(
                path, image, list(zip(row, probabilities, strict=True))[: max(top, count)], row[:count]
            )


def _read(trained: TrainedModel, path: Path) -> np.ndarray | str:
    """Read the pixels of a file, or say why they cannot be read."""
    try:
        manifest = trained.manifest
        return read_image_file(path, manifest.image_mode, trained.framing, manifest.orientation)
    except ValueError as error:
        return str(error)
