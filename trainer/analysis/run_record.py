"""Read a run's folder for a report: recipe, curves, summary, starts. Computes nothing, needs no data set.

Works for runs in any state. What is missing or cannot be read becomes a line in `left_out`; only a folder that holds no run
is an error.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.schema import Recipe
from shardstep.configs.text import count, listed
from shardstep.datasets.manifest import Manifest
from shardstep.trainer.analysis.trained_model import read_train_manifest
from shardstep.trainer.monitoring.status import Line, bad_images_texts, evaluated_on
from shardstep.trainer.optim.losses import RECONSTRUCTION, decides_each_class
from shardstep.trainer.run_dir import RunDir, State


@dataclass
class RunRecord:
    """The content of a run's folder."""

    run_dir: RunDir
    recipe: Recipe
    state: State
    train: list[Line]  # the lines of metrics.jsonl, in their order, like `evaluations`
    evaluations: list[Line]
    summary: dict[str, Any]  # empty where there is none
    starts: list[dict[str, Any]]  # of each: command, hardware and versions
    manifest: Manifest | None  # of the training set; None where it was not written
    left_out: list[str] = field(default_factory=list)  # what cannot be shown, and why

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run_dir.path

    @property
    def reconstructs(self) -> bool:
        """Whether images are the targets, and nothing is correct or wrong."""
        return self.recipe.loss.get("name") in RECONSTRUCTION

    @property
    def finds_several(self) -> bool:
        """Whether images have several labels, and each class is decided on by itself."""
        several = self.manifest is not None and self.manifest.has_several_labels
        return several and decides_each_class(str(self.recipe.loss.get("name")))

    @property
    def last(self) -> Line:
        """The last line of metrics.jsonl; empty where there is none."""
        return max([*self.train, *self.evaluations], key=lambda line: line["step"], default={})

    @property
    def last_evaluation(self) -> Line:
        """The last evaluation; empty where there was none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def evaluated_on(self) -> str:
        """The set of the evaluations: test or validation."""
        return evaluated_on(self.last_evaluation)

    @property
    def final(self) -> dict[str, Any]:
        """The metrics at the end: those of the summary, on the test set; before the end those of the last evaluation."""
        found = _mapping(self.summary.get("eval")) if self.state == "finished" else {}
        return found or self.last_evaluation

    @property
    def best(self) -> dict[str, Any]:
        """Step and metrics of the best evaluation; empty where there was none, or no summary was written."""
        return _mapping(self.summary.get("best"))

    @property
    def last_start(self) -> dict[str, Any]:
        """The last start; empty where none was written."""
        return self.starts[-1] if self.starts else {}

    @property
    def hardware(self) -> dict[str, Any]:
        """The hardware of the last start; empty where it was not written."""
        return _mapping(self.last_start.get("hardware"))

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the last start; empty where they were not written."""
        return _mapping(self.last_start.get("versions"))


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        InputError: it holds no run, or its config.yaml cannot be read.
    """
    run_dir = RunDir(folder)
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not run_dir.is_run:
        above = RunDir(folder.resolve().parent.parent)
        hint = f"; it lies in the run {above.path}" if above.is_run else ""
        raise InputError(f"{folder} is not a run's folder: no {run_dir.config_path.name}{hint}")
    left_out: list[str] = []
    loaded = run_dir.config
    if loaded.problems:
        left_out.append(
            f"{run_dir.config_path.name} was written by another version of shardstep, these of its keys are not shown: "
            f"{'; '.join(loaded.problems)}"
        )
    lines, starts, summary, manifest = _read_lines(run_dir, left_out), run_dir.starts, {}, None
    try:
        summary = run_dir.read_summary()
    except InputError as error:
        left_out.append(f"the summary: {error}")
    left_out += bad_images_texts(summary)
    if not starts:
        left_out.append(f"hardware, versions and command: {run_dir.starts_path.name} is missing or damaged")
    try:
        manifest = read_train_manifest(run_dir)
    except InputError as error:
        left_out.append(f"the data set, and the model's predictions for it: {error}")
    return RunRecord(
        run_dir=run_dir,
        recipe=loaded.recipe,
        state=run_dir.state(newest_step=max((line["step"] for line in lines), default=0)),
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "eval"],
        summary=summary,
        starts=starts,
        manifest=manifest,
        left_out=left_out,
    )


def check_comparable(records: list[RunRecord]) -> None:
    """Check that runs can be shown side by side.

    Raises:
        InputError: they are of different tasks: other classes, or one classifies and another reconstructs.
    """
    first, problems = records[0], []
    for other in records[1:]:
        both = (first.manifest, other.manifest)
        same_classes = None in both or len({tuple(one.classes) for one in both if one}) == 1
        if other.reconstructs != first.reconstructs or not same_classes:
            problems.append(f"{first.folder} {_task(first)}, {other.folder} {_task(other)}")
    if problems:
        raise InputError.from_problems("runs of different tasks cannot be compared, report on each alone", problems)


def differing_keys(recipes: list[Recipe]) -> dict[str, list[Any]]:
    """Return the keys in which recipes differ, and the value of each recipe; None where it has no such key.

    Leaves out run.dir and run.name.
    """
    flat = [
        {
            f"{section}.{key}": value
            for section, keys in dataclasses.asdict(recipe).items()
            for key, value in keys.items()
        }
        for recipe in recipes
    ]
    values = {key: [one.get(key) for one in flat] for keys in flat for key in keys}
    differing = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
    return {key: row for key, row in differing.items() if key not in ("run.dir", "run.name")}


def number(line: Line, key: str) -> float | None:
    """Return a finite number of a line; None where it has none."""
    value = line.get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type] # a number, by the line above


def _task(record: RunRecord) -> str:
    if record.reconstructs:
        return "reconstructs images"
    classes = record.manifest.classes if record.manifest else []
    return f"has {count(len(classes), 'class', 'classes')} ({listed(classes, most=3)})"


def _read_lines(run_dir: RunDir, left_out: list[str]) -> list[Line]:
    name = run_dir.metrics_path.name
    try:
        found = run_dir.read_metrics()
    except InputError as error:
        left_out.append(f"curves: {error}")
        return []
    lines = [line for line in found if line and None not in (number(line, "step"), number(line, "epoch"))]
    damaged = len(found) - len(lines)
    if found and not (lines and found[-1] is lines[-1]):
        damaged -= 1  # the last line of a run that is being written, or was killed, may be cut
    if damaged:
        left_out.append(f"{damaged} of {len(found)} lines of {name}: they are damaged, or of another version")
    if not lines:
        left_out.append(f"curves: {name} is missing, or holds no intact line yet")
    return lines


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
