"""Predict every sample of a test set with a trained model: computed once, kept in the run's folder."""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from shardstep.configs.files import file_sha256, write_atomically
from shardstep.datasets.batches import test_batches
from shardstep.datasets.progress import progress_bar
from shardstep.trainer.analysis.trained_model import TrainedModel
from shardstep.trainer.models.views import predict
from shardstep.trainer.optim.losses import one_label

_VERSION = "2"
_ARRAYS = ("labels", "predicted", "confidence", "errors")
# What NumPy and zipfile raise for one flipped byte, wherever it is; RuntimeError: it seems to ask for a method or a password.
_DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _no_ids() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for a test set, in the order of the manifest, without images that cannot be decoded."""

    labels: np.ndarray  # int64 (N,)
    predicted: np.ndarray  # int64 (N,), the class with the highest output; empty for reconstruction, like `confidence`
    confidence: np.ndarray  # float32 (N,), the softmax of that output: the mean over the recipe's views
    errors: np.ndarray  # float32 (N,), each sample's loss if the model reconstructs images, else empty
    ids: np.ndarray = field(default_factory=_no_ids)
    """int64 (N,), of the samples; files of earlier versions have none, and are read only where the test set is gone."""

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): whether the prediction is the label."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        """Share of samples whose prediction is their label."""
        return float(self.correct.mean())

    def per_class_accuracy(self, num_classes: int) -> list[float | None]:
        """Return the share of each class's samples whose prediction is their label; None for a class without samples."""
        samples, correct = (
            np.bincount(labels, minlength=num_classes).tolist() for labels in (self.labels, self.labels[self.correct])
        )
        return [right / total if total else None for right, total in zip(correct, samples, strict=True)]

    def most_frequent_mistakes(self, count: int) -> list[tuple[int, int, int]]:
        """Return labels with what is most often predicted instead, and how often, the most frequent first."""
        wrong = np.stack([self.labels, self.predicted], axis=1)[~self.correct]
        pairs, times = np.unique(wrong, axis=0, return_counts=True)
        chosen = np.argsort(-times, kind="stable")[:count]
        return [(*pairs[place].tolist(), int(times[place])) for place in chosen]

    def confusion(self, num_classes: int) -> np.ndarray:
        """Count samples, int64 (classes, classes), which is large for many; row: label, column: prediction."""
        counts = np.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def most_confident_mistakes(self, count: int) -> np.ndarray:
        """Return the numbers of the mistakes with the highest confidence, the highest first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]


def predict_test_set(trained: TrainedModel, cache: Path, tell: Callable[[str], None]) -> Predictions:
    """Predict a run's test set, or return what an earlier call has kept for these weights, also if the test set is gone.

    Args:
        cache: file that the predictions are kept in; a folder that cannot be written is no error.
        tell: called with a message when they cannot be kept, or the classes of the test set are not those of the run.

    Raises:
        InputError: the test set cannot be read, and nothing is kept.
    """
    views, sure_above = trained.recipe.eval.views, trained.recipe.eval.sure_above
    made_with = [_VERSION, file_sha256(trained.weights), views, str(sure_above)]
    try:
        test, reader = trained.open_test_set(tell=tell)
    except ValueError:
        kept = _read(cache, made_with)
        if kept is None:
            raise
        return kept
    samples, made_of = test.samples, f"{test.manifest.fingerprint} {test.samples}"
    kept = _read(cache, made_with, made_of)
    if kept is not None:
        return kept
    parts: list[tuple[np.ndarray, ...]] = []
    with progress_bar(f"predicting {trained.test_set_name}", samples, "images") as advance, torch.inference_mode():
        for images, labels, ids in test_batches(
            reader,
            test.all_ids(),
            batch_size=trained.recipe.eval.batch_size,
            rank=0,
            world_size=1,
            normalize=trained.normalize,
            memory_format=torch.contiguous_format,
            device=trained.device,
            workers=max(1, trained.recipe.data.workers),
        ):
            outputs = predict(trained.module, images, views, sure_above)  # (B, K), or images
            labels = one_label(labels)
            if trained.objective.reconstructs:
                empty = labels[:0]
                row = (labels, empty, empty, trained.objective.evaluation_loss(outputs, images))
            else:
                confidence, predicted = outputs.softmax(dim=1).max(dim=1)
                row = (labels, predicted, confidence, labels[:0])
            parts.append((*(values.cpu().numpy() for values in row), ids))
            advance(len(labels))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    found = Predictions(
        columns[0], columns[1], columns[2].astype(np.float32), columns[3].astype(np.float32), columns[4]
    )
    _write(found, cache, [*made_with, made_of], tell)
    return found


def _write(found: Predictions, cache: Path, key: list[str], tell: Callable[[str], None]) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, key=np.array(key), **vars(found))
    try:
        write_atomically(cache, stream.getvalue())
    except OSError as error:
        tell(f"{cache} could not be written, the predictions will be computed again: {error.strerror}")


def _read(cache: Path, made_with: list[str], made_of: str | None = None) -> Predictions | None:
    """Read the predictions kept with this key for this test set, or for any; None if there are none, or they are damaged."""
    with contextlib.suppress(*_DAMAGED):
        file = np.load(io.BytesIO(cache.read_bytes()))  # no pickle: arrays of numbers and text
        *key, kept_of = file["key"].tolist()
        found = Predictions(**{name: file[name] for name in _ARRAYS}, ids=file.get("ids", _no_ids()))
        lengths = [len(getattr(found, name)) for name in _ARRAYS]
        samples = lengths[0]
        intact = lengths in ([samples, samples, samples, 0], [samples, 0, 0, samples])  # classes, or reconstructions
        has_ids = made_of is None or len(found.ids) == samples
        if intact and has_ids and key == made_with and made_of in (None, kept_of):
            return found
    return None
