"""A trained model and image files to the classes that it sees in them, one file after the other."""

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
    """What a model sees in a file.

    Attributes:
        path: of the file.
        pixels: uint8 (height, width, channels), as the model was given them.
        top: numbers and probabilities of the most probable classes, the most probable first.
    """

    path: Path
    pixels: np.ndarray
    top: list[tuple[int, float]]


def predict_files(
    trained: TrainedModel, files: list[Path], top: int, unreadable: Callable[[Path, str], None]
) -> Iterator[FilePrediction]:
    """Predict image files, in their order; some are read while the model looks at those before.

    Args:
        trained: a model that classifies.
        files: of any size and kind of image.
        top: how many classes are told of each, at most all.
        unreadable: told of each file that is left out, and why.
    """
    groups = (files[start : start + _BATCH] for start in range(0, len(files), _BATCH))
    for group in read_ahead(groups, lambda group: lambda: [(path, _read(trained, path)) for path in group], _WORKERS):
        whole = []
        for path, read in group:
            if isinstance(read, str):
                unreadable(path, read)
            else:
                whole.append((path, read))
        if not whole:
            continue
        pixels = torch.from_numpy(np.stack([image for _, image in whole]))
        with torch.inference_mode():
            outputs = trained.module(trained.normalize(pixels.to(trained.device))).float()  # (B, K)
            shares, classes = outputs.softmax(dim=1).topk(min(top, outputs.shape[1]), dim=1)
        for (path, image), row, probabilities in zip(whole, classes.tolist(), shares.tolist(), strict=True):
            yield FilePrediction(path, image, list(zip(row, probabilities, strict=True)))


def _read(trained: TrainedModel, path: Path) -> np.ndarray | str:
    """The pixels of a file, or why there are none."""
    try:
        return read_image_file(path, trained.manifest.image_mode, trained.image_shape)
    except ValueError as error:
        return str(error)
