"""Follow a run through the file system: the lines of its metrics.jsonl, as they are appended."""

import os
from collections import deque
from pathlib import Path
from typing import Any, Literal

from shardstep.configs.errors import InputError
from shardstep.trainer.monitoring.status import parse_line

_BOTH = {"kind", "step", "epoch", "loss", "accuracy", "total_steps", "time"}
_NEEDED = {
    "train": _BOTH | {"lr", "samples_per_s", "data_wait_share", "memory_mb", "left_s"},
    "eval": _BOTH | {"train_accuracy", "wall_s"},
}
"""The keys of a line of each kind that are printed."""
_RECENT = 20  # lines: enough for an evaluation to be among them, as a rule


class MetricTail:
    """A reader of the lines that are appended to a run's metrics.jsonl; complete lines only."""

    def __init__(self, path: Path, begin_at: Literal["start", "end"]):
        """`path` may come later; `begin_at`: start also returns present lines, and those that a restarted run has kept."""
        self._path, self._begin_at = path, begin_at
        self._offset, self._file_id = 0, None
        self._gaps_s: deque[float] = deque(maxlen=_RECENT)
        self._last_s: float | None = None
        self.restarted = False  # whether the lines of the last call are from a file that was cut
        place = self._stat()
        if place and begin_at == "end":
            self._offset, self._file_id = place.st_size, place.st_ino

    def new(self) -> list[dict[str, Any]]:
        """Return the lines since the last call. A file that a restarted run has cut is read from its start again, or its end.

        Raises:
            InputError: another version of shardstep wrote them.
        """
        self.restarted = False
        place = self._stat()
        if place is None:
            return []
        if place.st_size < self._offset or self._file_id not in (None, place.st_ino):
            self.restarted = True
            self._offset = 0 if self._begin_at == "start" else place.st_size
        self._file_id = place.st_ino
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        # None: the file was cut and has grown again since the last call
        lines = [line for text in complete.splitlines() if (line := parse_line(text))]
        for line in lines:
            if missing := _NEEDED[line["kind"]] - line.keys():
                lacking = ", ".join(sorted(missing))
                raise InputError(f"{self._path} was written by an older version of shardstep: its lines lack {lacking}")
            self._gaps_s.append(line["time"] - (self._last_s or line["time"]))
            self._last_s = line["time"]
        return lines

    def usual_gap_s(self) -> float:
        """Return the longest time between two of the last lines."""
        return max(self._gaps_s, default=0.0)

    def _stat(self) -> os.stat_result | None:
        try:
            return self._path.stat()
        except OSError:
            return None
