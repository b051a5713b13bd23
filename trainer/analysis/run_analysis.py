"""Analyse a run for a report: its model's predictions for the test set, mistakes, calibration and filters."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from shardstep.configs.errors import InputError
from shardstep.datasets.decode import resize_to_cover
from shardstep.datasets.reader import StreamReader
from shardstep.trainer.analysis.calibration import Bin, reliability
from shardstep.trainer.analysis.filters import first_filters
from shardstep.trainer.analysis.predictions import Predictions, predict_test_set
from shardstep.trainer.analysis.run_record import RunRecord
from shardstep.trainer.analysis.trained_model import TrainedModel, open_trained_model

MOST_MISTAKES = 24
_THUMBNAIL = 112  # pixels: the longer side of an image in a page


@dataclass(frozen=True)
class Mistake:
    """A test image (H, W, C) uint8 that the model classifies wrongly."""

    pixels: np.ndarray
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Reconstruction:
    """A test image (H, W, C) uint8, its reconstruction by the model, and the loss."""

    original: np.ndarray
    reconstruction: np.ndarray
    error: float


@dataclass
class RunAnalysis:
    """What a report shows of one run."""

    record: RunRecord
    weights: str = ""  # which weights the rest belongs to; empty where there are none
    predictions: Predictions | None = None  # for the test set
    bins: list[Bin] = field(default_factory=list)  # of the reliability diagram
    mistakes: list[Mistake] = field(default_factory=list)  # those with the highest confidence
    reconstructions: list[Reconstruction] = field(default_factory=list)  # those with the largest error
    filters: np.ndarray | None = None  # of the first layer, uint8 (units, height, width, channels)
    left_out: list[str] = field(default_factory=list)  # what cannot be shown, and why

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty where they are not known."""
        return self.record.manifest.classes if self.record.manifest else []

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """The accuracy on each class by the predictions, else by the last evaluation; empty where there was none.

        Where images have several labels, the average precision of each.
        """
        if self.predictions is not None and not self.record.reconstructs:
            return self.predictions.per_class_accuracy(len(self.classes))
        last = self.record.last_evaluation
        written = last.get("per_class_ap" if self.record.finds_several else "per_class_accuracy")
        return written if isinstance(written, list) and len(written) == len(self.classes) else []


def analyse_run(record: RunRecord, device: Literal["auto", "cpu", "cuda"]) -> RunAnalysis:
    """Analyse a run. The predictions for the test set are computed once and kept in the run's folder."""
    found = RunAnalysis(record, left_out=list(record.left_out))
    if record.manifest is None:
        return found
    try:
        trained = open_trained_model(record.folder, device)
    except InputError as error:
        found.left_out.append(f"predictions for the test set, and filters: {error}")
        return found
    found.weights = trained.which
    filters = first_filters(trained.module, trained.image_shape)
    if isinstance(filters, str):
        found.left_out.append(f"filters: {filters}")
    else:
        found.filters = filters
    if not record.finds_several:
        _analyse_test_set(found, trained)
    return found


def _analyse_test_set(found: RunAnalysis, trained: TrainedModel) -> None:
    try:
        predictions = predict_test_set(trained, found.record.run_dir.predictions_path, found.left_out.append)
    except (InputError, OSError) as error:  # a run that is still training may have deleted that checkpoint
        found.left_out.append(f"predictions for the test set: {error}")
        return
    if not (np.isfinite(predictions.confidence).all() and np.isfinite(predictions.errors).all()):
        found.left_out.append("predictions for the test set: some outputs are NaN or infinite")
        return
    found.predictions = predictions
    if not found.record.reconstructs:
        found.bins = reliability(predictions.confidence, predictions.correct)
    try:
        _, reader = trained.open_test_set()
        if found.record.reconstructs:
            found.reconstructions = _worst_reconstructions(predictions, trained, reader)
        else:
            found.mistakes = read_mistakes(predictions, reader, MOST_MISTAKES)
    except InputError as error:
        found.left_out.append(f"test images: {error}")


def read_mistakes(predictions: Predictions, reader: StreamReader, most: int) -> list[Mistake]:
    """Return the mistakes with the highest confidence, the highest first; large images are scaled down."""
    chosen = predictions.most_confident_mistakes(most)
    pixels, _ = reader.read(predictions.ids[chosen])
    return [
        Mistake(
            pixels=_thumbnail(image),
            label=int(predictions.labels[sample]),
            predicted=int(predictions.predicted[sample]),
            confidence=float(predictions.confidence[sample]),
        )
        for image, sample in zip(pixels.numpy(), chosen, strict=True)
    ]


def _worst_reconstructions(
    predictions: Predictions, trained: TrainedModel, reader: StreamReader
) -> list[Reconstruction]:
    chosen = np.argsort(-predictions.errors, kind="stable")[: MOST_MISTAKES // 2]
    pixels, _ = reader.read(predictions.ids[chosen])
    with torch.inference_mode():
        made = trained.normalize.undo(trained.module(trained.normalize(pixels.to(trained.device)))).cpu()
    return [
        Reconstruction(_thumbnail(before), _thumbnail(after), float(predictions.errors[sample]))
        for before, after, sample in zip(pixels.numpy(), made.numpy(), chosen, strict=True)
    ]


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = min(1.0, _THUMBNAIL / max(height, width))
    return resize_to_cover(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
