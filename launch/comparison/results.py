"""Run folders to the results of a comparison: the state of each run, its curve, its costs. Reads only."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from shardstep.launch.comparison.significance import mean_interval
from shardstep.trainer.run_dir import RunDir, State

_TAIL_SHARE = 0.2  # of a run's samples: the final training loss is the mean over this last part
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: no optimizer updates them
EXPLODED = 10.0
"""Times the training loss of a variant's best learning rate: a loss above that counts as exploded."""


@dataclass(frozen=True)
class Point:
    """An evaluation: the run's position, its seconds of training, and the figures for what was held out.

    Where images have several labels, `accuracy` is the mean average precision, here and in a RunResult.
    """

    step: int
    epoch: float
    samples: int
    train_s: float
    loss: float | None
    accuracy: float | None
    train_loss: float | None


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Attributes:
        state: of the run's folder, or missing if there is none.
        reason: why it did not finish, in a line.
        has_diverged: whether it failed with a NaN or infinite loss. It would fail again, so it is not run again.
        curve: its evaluations.
        train_loss: mean over the last fifth of the samples that it trained on; None if it is not finished.
        accuracy: at the end, on the test set, or on the fold that the run held out; None if it is not finished.
        validation_loss: at the end, if the run has a validation set or holds out a fold.
        measure: what `accuracy` is.
        world: ranks, device and precision, from its summary.
        data: numbers of samples and fingerprint, from its summary.
        start: hardware and versions, from its last start.
    """

    folder: str
    state: State | Literal["missing"]
    reason: str = ""
    has_diverged: bool = False
    curve: list[Point] = field(default_factory=list)
    train_loss: float | None = None
    accuracy: float | None = None
    validation_loss: float | None = None
    measure: Literal["accuracy", "mAP"] = "accuracy"
    wall_s: float | None = None
    world: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the run stays as it is: finished or diverged."""
        return self.state == "finished" or self.has_diverged

    @property
    def outcome(self) -> Literal["finished", "failed", "unfinished", "missing"]:
        """The outcome as tables and results.json have it; unfinished: the run can be resumed or started again."""
        if self.is_over:
            return "failed" if self.has_diverged else "finished"
        return "missing" if self.state == "missing" and not self.reason else "unfinished"

    @property
    def last(self) -> Point | None:
        """The evaluation at the end; None unless the run is finished."""
        return self.curve[-1] if self.state == "finished" and self.curve else None

    @property
    def search_loss(self) -> float | None:
        """The loss that a search by learning rate goes by: on the validation set, if there is one, else the training loss."""
        return self.train_loss if self.validation_loss is None else self.validation_loss

    @property
    def seconds_per_epoch(self) -> float | None:
        """Seconds of training for each pass over the training set."""
        return self.last.train_s / self.last.epoch if self.last and self.last.epoch else None

    def reached(self, target: float) -> Point | None:
        """Return the first evaluation whose accuracy is the target or more."""
        return next((point for point in self.curve if point.accuracy is not None and point.accuracy >= target), None)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as results.json has them."""
        return {key: value for key, value in asdict(self).items() if key != "has_diverged"} | {"state": self.outcome}


@dataclass(frozen=True)
class Variant:
    """All runs of one variant: by seed, and those of the search by learning rate.

    Attributes:
        rate: the tuned learning rate of the runs by seed: the best of the search, else the recipe's.
        overrides: what makes the variant.
        bytes_per_parameter: of the optimizer's state in a checkpoint; None if there is none.
    """

    name: str
    overrides: list[str]
    rate: float | None
    seeds: dict[int, RunResult]
    search: dict[float, RunResult]
    bytes_per_parameter: float | None = None

    @property
    def finished(self) -> list[RunResult]:
        """The runs by seed that are finished."""
        return [run for run in self.seeds.values() if run.last]

    @property
    def accuracies(self) -> list[float]:
        """Final accuracies of the finished runs."""
        return [run.accuracy for run in self.finished if run.accuracy is not None]

    def as_json(self) -> dict[str, Any]:
        """Return the variant and its runs as results.json has them."""
        return {
            "name": self.name,
            "overrides": self.overrides,
            "rate": self.rate,
            "optimizer_state_bytes_per_parameter": self.bytes_per_parameter,
            "runs": {str(seed): run.as_json() for seed, run in self.seeds.items()},
            "search": {f"{rate:g}": run.as_json() for rate, run in self.search.items()},
        }


def read_result(folder: Path, log: Path | None = None) -> RunResult:
    """Read the result of a run from its folder, and from the log of its process if there is one."""
    run = RunDir(folder)
    if not run.is_run:
        return RunResult(str(folder), "missing", last_complaint(log))
    lines, summary = [line for line in run.metrics() if line.keys() >= {"step", "epoch", "samples"}], run.summary
    state = run.state(lines[-1]["step"] if lines else 0)
    unknown: dict[str, Any] = {"loss": None, "accuracy": None, "train_loss": None}
    evaluations = [unknown | {"train_s": line["wall_s"]} | line for line in lines if line["kind"] == "eval"]
    evaluations = [line | {"accuracy": _score(line)} for line in evaluations]
    curve = [Point(**{key.name: line[key.name] for key in fields(Point)}) for line in evaluations]
    if state != "finished":
        # Summaries of earlier versions have no `failure`; their reason, or the last line, tells if the loss was not finite.
        was_nonfinite = "NaN or infinite" in str(summary.get("reason", "")) or (lines and lines[-1].get("loss") is None)
        guess = "nonfinite" if was_nonfinite else "error"
        has_diverged = state == "failed" and summary.get("failure", guess) == "nonfinite"
        complaint = (str(summary.get("reason", "")) if state == "failed" else "") or last_complaint(log)
        reason = complaint or ("the loss is NaN or infinite" if has_diverged else "it was stopped")
        return RunResult(str(folder), state, reason, has_diverged, curve)
    start, validation = run.starts[-1] if run.starts else {}, summary.get("validation") or {}
    final = validation if run.config.recipe.data.fold else summary.get("eval") or {}
    return RunResult(
        folder=str(folder),
        state="finished",
        curve=curve,
        train_loss=tail_loss(curve),
        accuracy=_score(final) if final else curve[-1].accuracy if curve else None,
        measure="mAP" if "map" in final else "accuracy",
        validation_loss=validation.get("loss"),
        wall_s=summary["wall_s"],
        world={key: summary[key] for key in ("world_size", "device", "precision")},
        data=summary.get("data", {}),
        start={key: start[key] for key in ("hardware", "versions") if key in start},
    )


def _score(scores: dict[str, Any]) -> float | None:
    return scores.get("map", scores.get("accuracy"))


def measure_of(variants: Sequence[Variant]) -> str:
    """Return what the finished runs are ranked by: accuracy, or mAP."""
    return next((run.measure for variant in variants for run in variant.finished), "accuracy")


def tail_loss(curve: Sequence[Point], share: float = _TAIL_SHARE) -> float | None:
    """Return the mean training loss over the last share of a run's samples.

    Of the earliest interval between evaluations only the part that is needed counts, by the interval's mean. None where a
    loss is missing, as in a reconstruction whose line was cut.
    """
    if not curve:
        return None
    wanted = share * curve[-1].samples
    total, samples = 0.0, 0.0
    for point, before in zip(reversed(curve), [*reversed(curve[:-1]), None], strict=True):
        if point.train_loss is None:
            return None
        count = min(point.samples - (before.samples if before else 0), wanted - samples)
        total, samples = total + count * point.train_loss, samples + count
        if samples >= wanted:
            break
    return total / samples if samples else None


def optimizer_memory(run: Path) -> float | None:
    """Return the bytes of the optimizer's tensors per parameter of the model in a run's last checkpoint, None if damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    from shardstep.trainer.checkpoints.checkpoint_files import OPTIMIZER, WEIGHTS

    if not (checkpoints := RunDir(run).checkpoints):
        return None
    try:
        saved = torch.load(checkpoints[-1] / OPTIMIZER, weights_only=True, map_location="cpu")
        with safe_open(checkpoints[-1] / WEIGHTS, framework="pt") as weights:
            names = [name for name in weights.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118 - not a mapping
            parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError):
        return None
    return _tensor_bytes(saved) / parameters


def final_accuracy(variant: Variant) -> str:
    """Format the mean of a variant's final accuracies with its interval, in per cent; without any, its worst outcome."""
    if not variant.accuracies:
        return worst_outcome(variant)
    interval = mean_interval(variant.accuracies)
    width = "" if interval.half_width is None else f" ±{100 * interval.half_width:.1f}"
    return f"{100 * interval.mean:.1f}{width}"


def worst_outcome(variant: Variant) -> str:
    """Return the worst outcome among the runs of a variant that has no accuracy."""
    found = [run.outcome for run in variant.seeds.values()]
    return next((outcome for outcome in ("failed", "unfinished", "missing") if outcome in found), "not evaluated")


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    if isinstance(value, dict):
        return sum(_tensor_bytes(part) for part in value.values())
    return sum(_tensor_bytes(part) for part in value) if isinstance(value, (list, tuple)) else 0


def last_complaint(log: Path | None) -> str:
    """Return the last error line of a process's log; without one, its last line."""
    if log is None or not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith(("error:", "failed:", "stopped by"))]
    return (complaints or lines[-1:] or [""])[-1]
