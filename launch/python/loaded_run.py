"""LoadedRun: a run's folder as an object, with what the run has left there."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shardstep.configs.errors import InputError
from shardstep.trainer.run_dir import RunDir, State, open_run_dir

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from shardstep.datasets.augment import Normalize
    from shardstep.trainer.analysis.run_analysis import Mistake
    from shardstep.trainer.analysis.trained_model import TrainedModel


def load_run(folder: str | PathLike[str]) -> "LoadedRun":
    """Load a run from its folder; it may still be training.

    Raises:
        InputError: the folder is not that of a run, or this version cannot read it.
    """
    open_run_dir(Path(folder))
    return LoadedRun(Path(folder))


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run's folder. Its files are read whenever they are asked for, except the weights, which are read once."""

    folder: Path

    def __repr__(self) -> str:
        scores = self.summary.get("eval") or {}
        found = [f"{name} {scores[name]:.2%}" for name in ("accuracy", "map") if scores.get(name) is not None]
        return f"<run {self.folder}: {', '.join([self.state, f'step {self.step:,}', *found])}>"

    @property
    def state(self) -> State:
        """The state of the run: running, stopped, preempted, killed, failed or finished."""
        return self._dir.state()

    @property
    def step(self) -> int:
        """The last step that is known of the run; 0 before the first."""
        steps = (line.get("step") for line in (*self.metrics, self.summary))
        return max((step for step in steps if isinstance(step, int)), default=0)

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """The resolved recipe: sections of keys and values, which `train` takes as a recipe."""
        return dataclasses.asdict(open_run_dir(self.folder)[1])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one for each log step (kind "train") and each evaluation (kind "eval")."""
        return self._dir.metrics()

    def frame(self) -> "pandas.DataFrame":
        """Return the metrics as a pandas frame with the same rows.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError(
                "frame() needs pandas: pip install pandas. `metrics` has the same rows as a list"
            ) from None
        return pandas.DataFrame(self.metrics)

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the run as it last ended; empty before its first end."""
        return self._dir.summary

    @property
    def model(self) -> "nn.Module":
        """The trained model, in evaluation mode; it takes what `normalize` returns.

        Its weights are the final ones, or those of the newest intact checkpoint if the run has not finished.

        Raises:
            InputError: there are no intact weights.
        """
        return self._trained.module

    @property
    def normalize(self) -> "Normalize":
        """The function from uint8 pixels (B, H, W, C), of the size that the run trains on, to the model's input."""
        return self._trained.normalize

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the model's outputs."""
        return self._trained.manifest.classes

    def mistakes(self, most: int = 24) -> "list[Mistake]":
        """Return the test images that the model classifies wrongly with the highest confidence, the highest first.

        Each has `pixels` (uint8, (H, W, C)), `label`, `predicted` (places in `classes`) and `confidence`.

        Raises:
            InputError: the model does not find one class an image, or its test set cannot be read.
        """
        trained = self._trained  # imports what follows without a warning
        from shardstep.trainer.analysis.predictions import predict_test_set
        from shardstep.trainer.analysis.run_analysis import read_mistakes

        if trained.objective.reconstructs or trained.objective.finds_several:
            raise InputError(f"{self.folder} does not find one class for each image, so no image counts as a mistake")
        with undisturbed():
            predictions = predict_test_set(trained, self._dir.predictions_path, print)
            return read_mistakes(predictions, trained.open_test_set()[1], most)

    @property
    def _dir(self) -> RunDir:
        return RunDir(self.folder)

    @cached_property
    def _trained(self) -> "TrainedModel":
        return open_model(self.folder)


def open_model(path: Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> "TrainedModel":
    """Open the model of a run's folder, or of one of its checkpoints; see open_trained_model."""
    with warnings.catch_warnings():
        # Accelerate imports tqdm's bar for notebooks, which nothing here draws.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from shardstep.trainer.analysis.trained_model import open_trained_model

    with undisturbed():
        return open_trained_model(path, device)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave torch's random state and its number of threads as they are before the block."""
    import torch

    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
