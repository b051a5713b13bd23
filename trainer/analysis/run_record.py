"""A run's folder to what it tells: recipe, curves, summary, starts. Reads files, computes nothing, needs no data set.

Works for runs that are finished, running, stopped, failed or killed. What a folder does not tell, or not any more, becomes a
line in `left_out`; only what is no run at all is an error.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.schema import Recipe
from shardstep.datasets.manifest import Manifest, parse_manifest
from shardstep.trainer.monitoring.status import Line, parse_line
from shardstep.trainer.optim.losses import RECONSTRUCTION
from shardstep.trainer.run_dir import RunDir, State


@dataclass
class RunRecord:
    """What a run's folder tells.

    Attributes:
        folder: of the run.
        recipe: as it was used.
        status: finished, running, preempted, failed, or killed: it ended without a word.
        train, evaluations: the lines of metrics.jsonl, in their order.
        summary: summary.json, empty where there is none.
        starts: of each start, command, hardware and versions.
        manifest: of the training set; None where it was not written.
        left_out: what cannot be told, and why.
    """

    folder: Path
    recipe: Recipe
    status: State
    train: list[Line]
    evaluations: list[Line]
    summary: dict[str, Any]
    starts: list[dict[str, Any]]
    manifest: Manifest | None
    left_out: list[str] = field(default_factory=list)

    @property
    def reconstructs(self) -> bool:
        """Whether images are the targets, and nothing is correct or wrong."""
        return self.recipe.loss.get("name") in RECONSTRUCTION

    @property
    def last(self) -> Line:
        """The last line of metrics.jsonl; empty where there is none."""
        lines = [*self.train, *self.evaluations]
        return max(lines, key=lambda line: line["step"]) if lines else {}

    @property
    def last_evaluation(self) -> Line:
        """The last evaluation; empty where there was none."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def hardware(self) -> dict[str, Any]:
        """That of the last start; empty where it was not written."""
        return _mapping(self.starts[-1].get("hardware")) if self.starts else {}

    @property
    def versions(self) -> dict[str, str]:
        """Those of the last start; empty where they were not written."""
        return _mapping(self.starts[-1].get("versions")) if self.starts else {}


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        InputError: it is none, or its config.yaml cannot be read.
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
    lines = _read_lines(run_dir.metrics_path, left_out)
    summary = _read_summary(run_dir.summary_path, left_out)
    if not run_dir.starts:
        left_out.append("hardware, versions and command: the run has no starts.json that can be read")
    return RunRecord(
        folder=folder,
        recipe=loaded.recipe,
        status=run_dir.state(),
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=[line for line in lines if line["kind"] == "eval"],
        summary=summary,
        starts=run_dir.starts,
        manifest=_read_manifest(run_dir.train_manifest_path, left_out),
        left_out=left_out,
    )


def check_comparable(records: list[RunRecord]) -> None:
    """Check that runs can stand side by side.

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


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as section.key -> value."""
    return {
        f"{section}.{key}": value
        for section, content in dataclasses.asdict(recipe).items()
        for key, value in content.items()
    }


def differing_keys(recipes: list[Recipe]) -> dict[str, list[Any]]:
    """The keys in which recipes differ, and the value of each; None where a recipe has no such key.

    Where a run lies and what it is called is not among them.
    """
    flat = [flat_recipe(recipe) for recipe in recipes]
    keys = [key for key in {key: None for one in flat for key in one} if key not in ("run.dir", "run.name")]
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def number(line: Line, key: str) -> float | None:
    """A finite number of a line; None where it has none."""
    value = line.get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type] # a number, by the line above


def _task(record: RunRecord) -> str:
    if record.reconstructs:
        return "reconstructs images"
    classes = record.manifest.classes if record.manifest else []
    return f"has {len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _read_lines(path: Path, left_out: list[str]) -> list[Line]:
    try:
        texts = path.read_text(errors="replace").splitlines()
    except OSError as error:
        left_out.append(f"curves: {path.name} cannot be read ({error.strerror})")
        return []
    lines = [content for text in texts if (content := _parse(text))]
    strange = len(texts) - len(lines)
    if texts and not _parse(texts[-1]):
        strange -= 1  # the last line of a run that is being written, or was killed, may be cut
    if strange:
        left_out.append(f"{strange} of {len(texts)} lines of {path.name}: they are damaged, or of another version")
    if not lines:
        left_out.append(f"curves: {path.name} holds no whole line yet")
    return lines


def _parse(text: str) -> Line | None:
    line = parse_line(text)
    return line if line and number(line, "step") is not None and number(line, "epoch") is not None else None


def _read_summary(path: Path, left_out: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}  # of a run that has not ended
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        left_out.append(f"the summary: {path.name} cannot be read ({str(error).splitlines()[0]})")
        return {}
    return _mapping(summary)


def _read_manifest(path: Path, left_out: list[str]) -> Manifest | None:
    try:
        return parse_manifest(path.read_text(), str(path))
    except OSError as error:
        left_out.append(
            f"the data set and all that the model says of it: {path.name} cannot be read ({error.strerror})"
        )
    except InputError as error:
        left_out.append(f"the data set and all that the model says of it: {error}")
    return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
