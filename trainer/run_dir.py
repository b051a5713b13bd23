"""RunDir: the files of a run's folder, how to read them, and the state of the run. No other module knows their names.

config.yaml                  the resolved recipe, rewritten by every start
train_manifest.json          classes, mean and std of the training set
starts.json                  command, hardware and versions of each start
metrics.jsonl                one line per log step and evaluation
checkpoints/step-NNNNNNNN/   see checkpoints/checkpoint_files.py
summary.json                 how the last start ended
model.safetensors            the final weights
predictions.npz              the model's predictions for the test set, kept for reports
STOP, SAVE                   requests: stop the run, save its state
hang-rank0.txt, ...          stacks of a run that has hung
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardstep.configs.load import LoadedRecipe, load_recipe
from shardstep.trainer.checkpoints.checkpoint_files import WEIGHTS, list_checkpoints
from shardstep.trainer.checkpoints.lock import is_held
from shardstep.trainer.monitoring.metric_tail import MetricTail
from shardstep.trainer.monitoring.status import Line, parse_line

State = Literal["running", "stopped", "preempted", "killed", "failed", "finished"]
"""Of a run. stopped: by a person, preempted: by a signal, both with the state saved; killed: ended without a summary."""
Status = Literal["finished", "preempted", "failed"]
"""What summary.json says of the last start; preempted: stopped on request, with its state saved."""
Failure = Literal["nonfinite", "hang", "input", "memory", "checkpoint", "lost_rank", "error"]
"""Why a run failed: NaN or infinite losses, a rank that hung, bad data, too little memory, a state that could not be saved at
a stop, another rank's end, or any other error."""
STATUSES: tuple[Status, ...] = ("finished", "preempted", "failed")


@dataclass(frozen=True)
class RunDir:
    """A run's folder, which need not exist."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def train_manifest_path(self) -> Path:
        """The manifest of the training set, without the shards: what an evaluation needs of it."""
        return self.path / "train_manifest.json"

    @property
    def starts_path(self) -> Path:
        """The starts of the run."""
        return self.path / "starts.json"

    @property
    def metrics_path(self) -> Path:
        """The curves."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """The end of the last start."""
        return self.path / "summary.json"

    @property
    def weights_path(self) -> Path:
        """The final weights."""
        return self.path / WEIGHTS

    @property
    def predictions_path(self) -> Path:
        """The predictions for the test set that a report has kept."""
        return self.path / "predictions.npz"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_run(self) -> bool:
        """Whether this is the folder of a run."""
        return self.config_path.is_file()

    @property
    def config(self) -> LoadedRecipe:
        """The resolved recipe, as it was read.

        Raises:
            InputError: there is none, or it is not YAML.
        """
        return load_recipe(str(self.config_path))

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, intact or not, oldest first."""
        return list_checkpoints(self.checkpoints_path)

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the last start that ended; empty where there is none that can be read."""
        found = _read_json(self.summary_path)
        return found if isinstance(found, dict) else {}

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first; empty where they were not written, or cannot be read."""
        found = _read_json(self.starts_path)
        return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []

    def metrics(self) -> list[Line]:
        """The intact lines of metrics.jsonl, in their order; the last one of a killed run may be cut."""
        try:
            texts = self.metrics_path.read_text(errors="replace").splitlines()
        except OSError:
            return []
        return [line for text in texts if (line := parse_line(text))]

    def tail(self, begin_at: Literal["start", "end"]) -> MetricTail:
        """The lines of metrics.jsonl as they come: from its start, or from its present end."""
        return MetricTail(self.metrics_path, begin_at)

    def state(self, newest_step: int | None = None, settling_s: float = 0.0) -> State:
        """The state of the run.

        A summary counts if it was written after the last start, which rewrites config.yaml, and after the last line of
        metrics.jsonl; or if nobody is in the folder and no step was taken after it.

        Args:
            newest_step: of the last line of metrics.jsonl, where it is known; else the file is read.
            settling_s: a run whose files changed less than so many seconds ago is not taken for killed.
        """
        summary, step = self.summary, self.summary.get("step")
        if newest_step is None:
            newest_step = max((line["step"] for line in self.metrics() if isinstance(line.get("step"), int)), default=0)
        has_ended = summary.get("status") in STATUSES and (not isinstance(step, int) or step >= newest_step)
        begun_s = modified_s(self.config_path)
        if has_ended and modified_s(self.summary_path) >= begun_s:
            return _end_of(summary)
        if is_held(self.path) or time.time() - max(begun_s, modified_s(self.metrics_path)) < settling_s:
            return "running"
        return _end_of(summary) if has_ended else "killed"


def _end_of(summary: dict[str, Any]) -> State:
    if summary["status"] == "preempted" and summary.get("stopped_by") == "person":
        return "stopped"
    return summary["status"]


def modified_s(path: Path) -> float:
    """When a file last changed, in seconds since the epoch; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
