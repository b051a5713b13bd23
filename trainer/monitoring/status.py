"""Status: the progress of a run from lines of metrics.jsonl, as text for terminals and logs. No torch here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardstep.configs.schema import TrainConfig
from shardstep.configs.text import count, duration, printable

Line = dict[str, Any]
_NO_CURVES = ("step", "time", "total_steps", "share_done", "left_s")


def parse_line(text: str | bytes) -> Line | None:
    """Parse a line of metrics.jsonl; None if it is damaged: the last line of a killed run may be cut."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.get("kind") in ("train", "eval") else None


def bad_images_texts(summary: dict[str, Any]) -> list[str]:
    """Say which images could not be decoded, by a run's summary: a line for training and for each set evaluated on."""
    texts, first = [], summary.get("first_bad_images", {})
    for name, number in summary.get("bad_images", {}).items():
        if number:
            what = f"{count(number, f'{name} image')} that cannot be decoded"
            if name == "train":
                what = (
                    f"the next image took the place of one that cannot be decoded, {count(number, 'time')} in training"
                )
            texts.append(what + (f": {samples_text(first[name])}" if first.get(name) else ""))
    return texts


def samples_text(samples: list[dict[str, Any]]) -> str:
    """Name samples by their shards and keys."""
    return ", ".join(f"{one['shard']}: sample {printable(one['key'])}" for one in samples)


@dataclass
class Status:
    """The newest metrics of a run."""

    total_steps: int | None = 0  # 0: not known; None: time may end the run before
    step: int = 0
    share_done: float = 0.0  # 0 to 1, at the last line
    train: Line = field(default_factory=dict)  # the last line of its kind, like `evaluation`; empty before the first
    evaluation: Line = field(default_factory=dict)
    saved_step: int | None = None  # of the last checkpoint
    saved_at_s: float = 0.0  # since the epoch

    def take(self, line: Line) -> None:
        """Take in a line of metrics.jsonl."""
        if line["kind"] == "train":
            self.train = line
        else:
            self.evaluation = line
        self.step, self.total_steps = line["step"], line["total_steps"]
        self.share_done = line.get("share_done", 0.0)  # lines of older versions lack it, but have a length

    def forget(self) -> None:
        """Forget the metrics of a run that has started again."""
        self.step, self.share_done, self.train, self.evaluation = 0, 0.0, {}, {}

    def saved(self, step: int, at_s: float) -> None:
        """Take in a checkpoint."""
        self.saved_step, self.saved_at_s = step, at_s

    @property
    def share(self) -> float:
        """The share of the run that is done now, 0 to 1; where its length is not known, at the last line."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else self.share_done

    def place(self, now_s: float) -> str:
        """Say how far the run has come, and how long it will still take."""
        if self.total_steps == 0:
            return "starting"
        parts = [f"{self.share:4.0%}  step {self.step:,}{'' if self.total_steps is None else f'/{self.total_steps:,}'}"]
        if self.train:
            parts += [f"epoch {self.train['epoch']:.4g}", f"{duration(self._left_s(now_s))} left"]
        return "  ".join(parts)

    def _left_s(self, now_s: float) -> float:
        """Scale the last train line's time left by the steps since; by the clock where they, or the length, are not known."""
        line = self.train
        if line["total_steps"] is None or self.step <= line["step"]:
            return max(0.0, line["left_s"] - (now_s - line["time"]))
        steps_left = max(0, line["total_steps"] - self.step)
        return float(line["left_s"]) * steps_left / max(1, line["total_steps"] - line["step"])

    def rows(self, now_s: float) -> list[str]:
        """Write two rows, each within 80 columns: loss, accuracy and lr; speed, memory and checkpoint."""
        train, evaluation = self.train, self.evaluation
        quality, speed = ["before the first log step"], []
        if train:
            quality = [_loss(train), _accuracy(train), f"lr {train['lr']:.3g}"]
            speed = [*_speed(train), f"{train['memory_mb']:,} MB"]
        if evaluation:
            shown = _score(evaluation) or _loss(evaluation)
            quality.append(f"{evaluated_on(evaluation)} {shown} (step {evaluation['step']:,})")
        if self.saved_step is not None:
            speed.append(f"saved step {self.saved_step:,}, {duration(max(0.0, now_s - self.saved_at_s))} ago")
        return ["  ".join(filter(None, quality)), "  ".join(speed)]


def describe_line(line: Line) -> str:
    """Describe a line of metrics.jsonl on one line."""
    if line["kind"] == "eval":
        score, before = line["accuracy"], line["train_accuracy"]
        trained = "-" if before is None else f"{before:.1%}"
        shown = _score(line) if score is None else f"accuracy {score:.2%} (train {trained})"
        parts = [f"epoch {line['epoch']:<5.4g} step {_of(line)}", f"{evaluated_on(line)} {_loss(line)}", shown]
        return "  ".join(filter(None, [*parts, f"{line['wall_s']:.0f} s"]))
    parts = [f"epoch {line['epoch']:<5.4g} {_loss(line)}", _accuracy(line), *_speed(line), f"lr {line['lr']:.3g}"]
    parts += [f"step {_of(line)}", f"{line['memory_mb']:,} MB", f"{duration(line['left_s'])} left"]
    return "  ".join(filter(None, parts))


def evaluated_on(line: Line) -> str:
    """Return what an evaluation line is about: "test" or "validation"; earlier versions knew only the test set."""
    return str(line.get("set", "test"))


def scalars_of(line: Line) -> dict[str, float]:
    """Return the numbers of a line that make a curve, by their name in trackers: <kind>/<name>."""
    return {
        f"{line['kind']}/{key}": value
        for key, value in line.items()
        if isinstance(value, (int, float)) and key not in _NO_CURVES
    }


def pictures_of(folder: Path) -> list[Path]:
    """List the pictures of a finished run."""
    return sorted(folder.glob("*.png"))


def length(train: TrainConfig) -> str:
    """Describe the length of a run."""
    return train.duration if train.max_wall_s is None else f"{train.max_wall_s:g} s of training, or {train.duration}"


def _loss(line: Line) -> str:
    if line["loss"] is not None:
        return f"loss {line['loss']:.4f}"
    return "step skipped" if line.get("skipped_steps") else "loss is NaN or infinite"


def _score(line: Line) -> str:
    """Return the score of an evaluation: accuracy, or mean average precision; empty if it has neither."""
    if line["accuracy"] is not None:
        return f"{line['accuracy']:.2%}"
    return "" if line.get("map") is None else f"mAP {line['map']:.2%}"


def _accuracy(line: Line) -> str:
    return "" if line["accuracy"] is None else f"accuracy {line['accuracy']:.1%}"


def _speed(line: Line) -> list[str]:
    return [f"{line['samples_per_s']:,.0f} images/s", f"data wait {line['data_wait_share']:.0%}"]


def _of(line: Line) -> str:
    return f"{line['step']}" if line["total_steps"] is None else f"{line['step']}/{line['total_steps']}"
