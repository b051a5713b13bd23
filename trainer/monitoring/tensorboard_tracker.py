"""TensorBoard: a run's metrics as event files in its folder."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from shardstep.configs.schema import Recipe
from shardstep.trainer.monitoring.status import pictures_of, scalars_of

Line = dict[str, Any]
_FLUSHED_S = 20  # between writes to disk


class TensorBoardTracker:
    """A Tracker: train and evaluation lines as <kind>/<name>, the config as text, the pictures at the end.

    A resumed run writes its events anew from metrics.jsonl, which has exactly what happened: a killed process leaves events
    of steps that are taken again, and others unwritten. An open TensorBoard drops what it had.
    """

    name = "TensorBoard"
    sends_files = False

    def __init__(self, recipe: Recipe, folder: Path, metrics: Path, facts: Line):
        """`recipe`: as the run's config; `metrics`: its metrics.jsonl; `facts`: of code and hardware."""
        self._recipe, self._folder, self._metrics, self._facts = recipe, folder, metrics, facts
        self._events = folder / "tensorboard"
        self._writer: Any = None
        self._past: list[str] = []

    def start(self) -> None:
        """Open a new event file, and delete those of earlier starts."""
        from torch.utils.tensorboard import SummaryWriter  # a second: only where it is wanted

        self._past = self._metrics.read_text().splitlines() if self._metrics.is_file() else []
        old = list(self._events.glob("events.out.tfevents.*"))
        for path in old:
            path.unlink()
        self._writer = SummaryWriter(str(self._events), purge_step=0 if old else None, flush_secs=_FLUSHED_S)
        self._text("config", dataclasses.asdict(self._recipe))
        self._text("facts", self._facts)

    def catch_up(self) -> None:
        """Write the lines of earlier starts."""
        for line in self._past:
            self.log(json.loads(line))

    def log(self, line: Line) -> None:
        """Write the numbers of a line of metrics.jsonl."""
        for name, value in scalars_of(line).items():
            self._writer.add_scalar(name, value, line["step"], walltime=line.get("time"))  # older versions wrote none

    def saved(self, path: Path) -> None:
        """Do nothing: checkpoints stay where they are."""

    def finish(self, summary: Line, failed: bool) -> None:
        """Write pictures and summary, and close the file."""
        import cv2

        if summary["status"] == "finished":
            for path in pictures_of(self._folder):
                pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)  # (H, W, C)
                self._writer.add_image(f"pictures/{path.stem}", pixels, summary["step"], dataformats="HWC")
        self._text("summary", summary)
        self._writer.close()

    def note(self) -> str:
        """Say how to open the curves."""
        return f"curves: tensorboard --logdir {shlex.quote(str(self._events))}"

    def _text(self, name: str, content: Line) -> None:
        text = yaml.safe_dump(content, sort_keys=False)
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))  # Markdown for: as it is
