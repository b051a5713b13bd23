"""Run folders to what a comparison says of them: the state of each run, its curve, its costs. Reads, and starts nothing."""

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shardstep.launch.comparison.significance import mean_interval
from shardstep.trainer.monitoring.status import parse_line

State = Literal["finished", "failed", "unfinished", "missing"]
_TAIL_SHARE = 0.2  # of a run's samples, over whose last part the final training loss is a mean
EXPLODED = 10.0
"""Times the training loss of a variant's best rate: above that, another rate's is no longer a matter of degree."""


@dataclass(frozen=True)
class Point:
    """An evaluation: where the run was, its seconds of training, and the test set's figures."""

    step: int
    epoch: float
    samples: int
    train_s: float
    loss: float | None
    accuracy: float | None
    train_loss: float | None


@dataclass(frozen=True)
class RunResult:
    """What became of one run.

    Attributes:
        state: finished; failed in training, as with NaN, and it would fail again; unfinished: it can go on; missing.
        reason: why it failed or is unfinished, in a line.
        curve: its evaluations.
        train_loss: mean over the last fifth of the samples that it trained on; None if it is not finished.
        world: ranks, device and precision, from its summary.
        data: numbers of samples and fingerprint, from its summary.
        start: hardware and versions, from its last start.
    """

    folder: str
    state: State
    reason: str = ""
    curve: list[Point] = field(default_factory=list)
    train_loss: float | None = None
    wall_s: float | None = None
    world: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Point | None:
        """The evaluation at the end; None unless the run is finished."""
        return self.curve[-1] if self.state == "finished" and self.curve else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """Seconds of training for each pass over the training set."""
        return self.last.train_s / self.last.epoch if self.last and self.last.epoch else None

    def reached(self, target: float) -> Point | None:
        """The first evaluation whose accuracy is the target or more."""
        return next((point for point in self.curve if point.accuracy is not None and point.accuracy >= target), None)


@dataclass(frozen=True)
class Variant:
    """All runs of one variant: with its seeds, and those of the search for a rate, by rate.

    Attributes:
        rate: that the seeds were run with: the search's best, or the recipe's own.
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
        """The runs with its seeds that came to their end."""
        return [outcome for outcome in self.seeds.values() if outcome.last]

    @property
    def accuracies(self) -> list[float]:
        """Final accuracies of the finished runs."""
        return [
            outcome.last.accuracy for outcome in self.finished if outcome.last and outcome.last.accuracy is not None
        ]


def read_result(folder: Path, log: Path | None = None) -> RunResult:
    """What became of a run, by its folder; `log` is what its process printed, if that was kept."""
    found = _read_json(folder / "summary.json")
    summary = found if isinstance(found, dict) else {}
    status = summary.get("status")
    if not (folder / "config.yaml").is_file():
        complaint = last_complaint(log)
        return RunResult(str(folder), "unfinished" if complaint else "missing", complaint)
    lines = read_lines(folder / "metrics.jsonl")
    curve = [_point(line) for line in lines if line["kind"] == "eval"]
    if status != "finished":
        complaint = str(summary.get("reason", "")) if status == "failed" else ""
        complaint = complaint or last_complaint(log)
        has_left_numbers = bool(lines) and lines[-1].get("loss") is None
        for_good = status == "failed" and (has_left_numbers or "NaN or infinite" in complaint)
        state: State = "failed" if for_good else "unfinished"
        reason = complaint or ("the loss is no number" if for_good else "it was stopped")
        return RunResult(str(folder), state, reason, curve)
    return RunResult(
        folder=str(folder),
        state="finished",
        curve=curve,
        train_loss=tail_loss(curve),
        wall_s=summary["wall_s"],
        world={key: summary[key] for key in ("world_size", "device", "precision")},
        data=summary.get("data", {}),
        start=_last_start(folder / "starts.json"),
    )


def tail_loss(curve: Sequence[Point], share: float = _TAIL_SHARE) -> float | None:
    """The mean training loss over the last samples of a run, this share of them.

    An interval between evaluations that holds more than are wanted counts in part, by its own mean. None where a loss is
    missing, as in a reconstruction whose line was cut.
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
    """Bytes of the optimizer's tensors per parameter of the model, in a run's last checkpoint; None without a whole one."""
    import torch
    from safetensors import SafetensorError, safe_open

    from shardstep.trainer.checkpoints.checkpoint_files import OPTIMIZER, WEIGHTS, list_checkpoints

    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        return None
    try:
        saved = torch.load(checkpoints[-1] / OPTIMIZER, weights_only=True, map_location="cpu")
        with safe_open(checkpoints[-1] / WEIGHTS, framework="pt") as weights:
            names = [name for name in weights.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118 - it is no mapping
            parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError):
        return None
    return _tensor_bytes(saved) / parameters


def final_accuracy(variant: Variant) -> str:
    """The mean of a variant's final accuracies with its interval, in per cent; its runs' fate where there is none."""
    if not variant.accuracies:
        return fate(variant)
    interval = mean_interval(variant.accuracies)
    width = "" if interval.half_width is None else f" ±{100 * interval.half_width:.1f}"
    return f"{100 * interval.mean:.1f}{width}"


def fate(variant: Variant) -> str:
    """What became of the runs of a variant none of which has an accuracy: the worst state among them."""
    states = [outcome.state for outcome in variant.seeds.values()]
    return next((state for state in ("failed", "unfinished", "missing") if state in states), "not evaluated")


def record(variant: Variant) -> dict[str, Any]:
    """A variant as JSON has it."""
    return {
        "name": variant.name,
        "overrides": variant.overrides,
        "rate": variant.rate,
        "optimizer_state_bytes_per_parameter": variant.bytes_per_parameter,
        "runs": {str(seed): asdict(outcome) for seed, outcome in variant.seeds.items()},
        "search": {f"{rate:g}": asdict(outcome) for rate, outcome in variant.search.items()},
    }


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: no optimizer sees them


def _tensor_bytes(value: Any) -> int:
    """Of all tensors in nested containers."""
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    if isinstance(value, dict):
        return sum(_tensor_bytes(part) for part in value.values())
    return sum(_tensor_bytes(part) for part in value) if isinstance(value, (list, tuple)) else 0


def _point(line: dict[str, Any]) -> Point:
    train_s = line.get("train_s", line["wall_s"])
    values = [line.get(key) for key in ("loss", "accuracy", "train_loss")]
    return Point(line["step"], line["epoch"], line["samples"], train_s, *values)


def last_complaint(log: Path | None) -> str:
    """The last line by which a process said what was wrong."""
    if log is None or not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith(("error:", "failed:", "stopped by"))]
    return (complaints or lines[-1:] or [""])[-1]


def _read_json(path: Path) -> Any:
    """What a file holds; an empty mapping where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _last_start(path: Path) -> dict[str, Any]:
    starts = _read_json(path)
    last = starts[-1] if isinstance(starts, list) and starts else {}
    return {key: last[key] for key in ("hardware", "versions") if isinstance(last, dict) and key in last}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole."""
    lines = map(parse_line, path.read_text().splitlines() if path.is_file() else ())
    return [line for line in lines if line and {"step", "epoch", "samples"} <= set(line)]
