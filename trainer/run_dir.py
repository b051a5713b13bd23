"""RunDir: the files in a run's folder, how to read them, and the state of the run.

Only this module knows the names of the first files below. Pictures, report.html and profile/ are for people, and are written
where they are made.

config.yaml                  the resolved recipe, rewritten by every start
train_manifest.json          classes, mean and std of the training set
starts.json                  command, hardware and versions of each start
metrics.jsonl                one line per log step and evaluation
checkpoints/step-NNNNNNNN/   see checkpoints/checkpoint_files.py
summary.json                 how the last start ended
model.safetensors            the final weights
predictions.npz              the model's predictions for the test set, kept for reports
code/, code.json             copies of the files that the recipe names by import path, and their sha256

Those of a process, which stopping/ names:
STOP, SAVE                   requests: stop the run, save its state
hang-rank0.txt, ...          stacks of a hung run
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardstep.configs.errors import InputError
from shardstep.configs.files import file_sha256
from shardstep.configs.load import LoadedRecipe, load_recipe
from shardstep.configs.recipe_code import CODE
from shardstep.configs.schema import Recipe
from shardstep.trainer.checkpoints.checkpoint_files import (
    AVERAGE,
    WEIGHTS,
    list_checkpoints,
    newest_intact,
    problems_of,
)
from shardstep.trainer.checkpoints.lock import is_held
from shardstep.trainer.monitoring.metric_tail import MetricTail
from shardstep.trainer.monitoring.status import Line, parse_line

State = Literal["running", "stopped", "preempted", "killed", "failed", "finished"]
"""The state of a run. stopped (by a user) and preempted (by a signal): its state was saved; killed: it left no summary."""
Status = Literal["finished", "preempted", "failed"]
"""How summary.json says that the last start ended; preempted: stopped on request, with its state saved."""
Failure = Literal["nonfinite", "hang", "input", "memory", "checkpoint", "lost_rank", "error"]
"""Why a run failed: NaN or infinite losses, a hung rank, bad data, out of memory, a state that could not be saved at a stop,
another rank's end, or any other error."""
STATUSES: tuple[Status, ...] = ("finished", "preempted", "failed")


class _Name:
    """The name of a file in a run's folder; as an attribute of a RunDir, its path."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, run_dir: "RunDir", owner: type | None = None) -> Path:
        return run_dir.path / self._name


@dataclass(frozen=True)
class RunDir:
    """A run's folder, which need not exist."""

    path: Path

    config_path = _Name("config.yaml")
    train_manifest_path = _Name("train_manifest.json")  # without the shards: what an evaluation needs of it
    starts_path = _Name("starts.json")
    metrics_path = _Name("metrics.jsonl")
    summary_path = _Name("summary.json")
    weights_path = _Name(WEIGHTS)
    predictions_path = _Name("predictions.npz")
    checkpoints_path = _Name("checkpoints")
    code_path = _Name(CODE)
    code_json_path = _Name("code.json")

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
        """The summary of the last start that ended; empty where there is none, or it is damaged."""
        with contextlib.suppress(InputError):
            return self.read_summary()
        return {}

    def read_summary(self) -> dict[str, Any]:
        """Read the summary of the last start that ended; empty where there is none.

        Raises:
            InputError: it cannot be read, is damaged, or of another version of shardstep.
        """
        try:
            found = json.loads(self.summary_path.read_text())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"{self.summary_path} cannot be read: {error.strerror}") from None
        except ValueError:
            found = None
        if isinstance(found, dict) and found.get("status") in STATUSES and isinstance(found.get("step", 0), int):
            return found
        raise InputError(f"{self.summary_path} is damaged, or of another version of shardstep")

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first; empty where they are missing or damaged."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.starts_path.read_text())
            return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []
        return []

    def metrics(self) -> list[Line]:
        """Return the intact lines of metrics.jsonl, in their order; none where it cannot be read."""
        with contextlib.suppress(InputError):
            return [line for line in self.read_metrics() if line]
        return []

    def read_metrics(self) -> list[Line | None]:
        """Read metrics.jsonl, in its order; None for a damaged line, as the last one of a killed run may be.

        Raises:
            InputError: it exists, but cannot be read.
        """
        try:
            return [parse_line(text) for text in self.metrics_path.read_text(errors="replace").splitlines()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.metrics_path} cannot be read: {error.strerror}") from None

    def tail(self, begin_at: Literal["start", "end"]) -> MetricTail:
        """Return a reader of the lines that come to metrics.jsonl: from its start, or from its present end."""
        return MetricTail(self.metrics_path, begin_at)

    def state(self, newest_step: int | None = None, grace_s: float = 0.0) -> State:
        """Return the state of the run.

        A summary counts if it was written after the last start, which rewrites config.yaml, and after the last line of
        metrics.jsonl; or if no process holds the folder and no step was taken after it.

        Args:
            newest_step: of the last line of metrics.jsonl, where it is known; else the file is read.
            grace_s: a run whose files changed less than so many seconds ago does not count as killed.
        """
        summary = self.summary
        if newest_step is None:
            newest_step = max((line["step"] for line in self.metrics() if isinstance(line.get("step"), int)), default=0)
        has_ended = bool(summary) and summary.get("step", newest_step) >= newest_step
        begun_s = modified_s(self.config_path)
        if not has_ended or modified_s(self.summary_path) < begun_s:
            if is_held(self.path) or time.time() - max(begun_s, modified_s(self.metrics_path)) < grace_s:
                return "running"
            if not has_ended:
                return "killed"
        by_user = summary["status"] == "preempted" and summary.get("stopped_by") == "person"
        return "stopped" if by_user else summary["status"]


def open_run_dir(folder: Path) -> tuple[RunDir, Recipe]:
    """Open the folder of a run, and read its recipe.

    Raises:
        InputError: the folder is not that of a run, or this version cannot read it.
    """
    run_dir = RunDir(folder)
    config = run_dir.config_path
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is not a folder")
    if not run_dir.is_run:
        raise InputError(f"{folder} holds no run: it has no {config.name}")
    loaded = run_dir.config
    if loaded.problems:
        raise InputError(f"{config} is of another version of shardstep, or damaged: {loaded.problems[0]}")
    if not loaded.recipe.model:
        raise InputError(f"{config} is incomplete: it has no model")
    run_dir.read_summary()
    return run_dir, loaded.recipe


def run_dir_of(path: Path) -> RunDir:
    """Return the folder of a run, given that or one of its checkpoints.

    Raises:
        InputError: it is neither.
    """
    resolved = path.resolve()
    for place in (resolved, resolved.parent.parent):
        if (found := RunDir(place)).is_run:
            return found
    raise InputError(f"{path} is neither a run's folder nor a checkpoint of one: no {RunDir(path).config_path.name}")


def find_weights(path: Path) -> tuple[Path, RunDir]:
    """Find the weights of a checkpoint or a run: the final ones if it is finished, else of its newest intact checkpoint.

    Raises:
        InputError: there are none, or they are damaged.
    """
    resolved, run_dir = path.resolve(), run_dir_of(path)
    if run_dir.path != resolved:
        problems = problems_of(resolved, only=(WEIGHTS, AVERAGE))
        if problems:
            raise InputError(f"{path} is damaged: {'; '.join(problems)}")
        return resolved / WEIGHTS, run_dir
    final, summary = run_dir.weights_path, run_dir.summary
    is_final = final.is_file() and summary.get("status") == "finished"
    claimed = summary.get("weights_sha256")  # runs of earlier versions have none
    if is_final and claimed and file_sha256(final) != claimed:
        raise InputError(
            f"{final} is damaged: its sha256 is not that in the summary. The newest checkpoint in "
            f"{run_dir.checkpoints_path} has the same weights"
        )
    newest, damaged = (None, []) if is_final else newest_intact(run_dir.checkpoints_path)
    if newest:
        return newest / WEIGHTS, run_dir
    if final.is_file():
        return final, run_dir
    cause = f": {'; '.join(damaged)}" if damaged else " yet"
    raise InputError(f"{path} has neither {WEIGHTS} nor an intact checkpoint{cause}")


def modified_s(path: Path) -> float:
    """Return when a file last changed, in seconds since the epoch; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
