"""What is known of a run that goes on: lines of metrics.jsonl in, text for terminals and logs out. No torch here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardstep.configs.schema import TrainConfig
from shardstep.configs.text import duration

Line = dict[str, Any]
_NO_CURVES = ("step", "time", "total_steps", "share_done", "left_s")


def parse_line(text: str | bytes) -> Line | None:
    """A line of metrics.jsonl; None if it is no whole one: the last line of a killed run may be cut."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.get("kind") in ("train", "eval") else None


@dataclass
class Status:
    """The newest figures of a run.

    Attributes:
        total_steps, step: how long it is and how far it has come; 0 while that is not known, and a length of None where
            time may end it before.
        share_done: how much of the run was done at the last line, 0 to 1.
        train, evaluation: the last line of each kind; empty before the first.
        saved_step, saved_at_s: the last checkpoint, and when it was whole, in seconds since the epoch.
    """

    total_steps: int | None = 0
    step: int = 0
    share_done: float = 0.0
    train: Line = field(default_factory=dict)
    evaluation: Line = field(default_factory=dict)
    saved_step: int | None = None
    saved_at_s: float = 0.0

    def take(self, line: Line) -> None:
        """Take in a line of metrics.jsonl."""
        if line["kind"] == "train":
            self.train = line
        else:
            self.evaluation = line
        self.step, self.total_steps = line["step"], line["total_steps"]
        self.share_done = line.get("share_done", 0.0)  # lines of older versions have none, but a length

    def forget(self) -> None:
        """The run has begun again: what it had learnt may not be true any more."""
        self.step, self.share_done, self.train, self.evaluation = 0, 0.0, {}, {}

    def saved(self, step: int, at_s: float) -> None:
        """Take in a checkpoint."""
        self.saved_step, self.saved_at_s = step, at_s

    @property
    def share(self) -> float:
        """How much of the run is done now, 0 to 1; where its length is not known, at the last line."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else self.share_done

    def place(self, now_s: float) -> str:
        """How far the run has come, and how long it will still take."""
        if self.total_steps == 0:
            return "starting"
        parts = [f"{self.share:4.0%}  step {self.step:,}{'' if self.total_steps is None else f'/{self.total_steps:,}'}"]
        if self.train:
            parts += [f"epoch {self.train['epoch']:.4g}", f"{duration(self._left_s(now_s))} left"]
        return "  ".join(parts)

    def _left_s(self, now_s: float) -> float:
        """At the pace of the last train line, by the steps since; by the clock where they, or the length, are not known."""
        line = self.train
        if line["total_steps"] is None or self.step <= line["step"]:
            return max(0.0, line["left_s"] - (now_s - line["time"]))
        steps_left = max(0, line["total_steps"] - self.step)
        return float(line["left_s"]) * steps_left / max(1, line["total_steps"] - line["step"])

    def rows(self, now_s: float) -> list[str]:
        """How well it learns, and how fast it works: two rows, each within 80 columns."""
        train, evaluation = self.train, self.evaluation
        learns, works = ["before the first log step"], []
        if train:
            learns = [_loss(train), _accuracy(train), f"rate {train['lr']:.3g}"]
            works = [*_speed(train), f"{train['memory_mb']:,} MB"]
        if evaluation:
            score = evaluation["accuracy"]
            shown = _loss(evaluation) if score is None else f"{score:.2%}"
            learns.append(f"test {shown} (step {evaluation['step']:,})")
        if self.saved_step is not None:
            works.append(f"saved step {self.saved_step:,}, {duration(max(0.0, now_s - self.saved_at_s))} ago")
        return ["  ".join(filter(None, learns)), "  ".join(works)]


def describe_line(line: Line) -> str:
    """A line of metrics.jsonl on one line."""
    if line["kind"] == "eval":
        score, before = line["accuracy"], line["train_accuracy"]
        shown = "" if score is None else f"accuracy {score:.2%} (train {_percent(before)})"
        parts = [f"epoch {line['epoch']:<5.4g} step {_of(line)}", f"test {_loss(line)}", shown]
        return "  ".join(filter(None, [*parts, f"{line['wall_s']:.0f} s"]))
    parts = [f"epoch {line['epoch']:<5.4g} {_loss(line)}", _accuracy(line), *_speed(line), f"rate {line['lr']:.3g}"]
    return "  ".join(
        filter(None, [*parts, f"step {_of(line)}", f"{line['memory_mb']:,} MB", f"{duration(line['left_s'])} left"])
    )


def scalars_of(line: Line) -> dict[str, float]:
    """The numbers of a line that make a curve, as trackers name them: <kind>/<name>."""
    return {
        f"{line['kind']}/{key}": value
        for key, value in line.items()
        if isinstance(value, (int, float)) and key not in _NO_CURVES
    }


def pictures_of(folder: Path) -> list[Path]:
    """The pictures that a finished run has left."""
    return sorted(folder.glob("*.png"))


def length(train: TrainConfig) -> str:
    """How long a run is to be."""
    return train.duration if train.max_wall_s is None else f"{train.max_wall_s:g} s of training, or {train.duration}"


def _loss(line: Line) -> str:
    if line["loss"] is not None:
        return f"loss {line['loss']:.4f}"
    return "step left out" if line.get("skipped_steps") else "loss is no number"


def _accuracy(line: Line) -> str:
    return "" if line["accuracy"] is None else f"accuracy {line['accuracy']:.1%}"


def _speed(line: Line) -> list[str]:
    return [f"{line['samples_per_s']:,.0f} images/s", f"data wait {line['data_wait_share']:.0%}"]


def _of(line: Line) -> str:
    return f"{line['step']}" if line["total_steps"] is None else f"{line['step']}/{line['total_steps']}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
