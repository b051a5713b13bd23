"""A run's output as events, for a parent process that shows it in its own way: a notebook, a program's terminal."""

import json
import time
from pathlib import Path
from typing import Any

from shardstep.trainer.monitoring.display import Display

_MARK = "\x1e"  # the record separator, which begins each text of a JSON sequence (RFC 7464)
_EVENTS = ("note", "start", "advance", "line", "saved", "stop")
_ADVANCES_PER_S = 4


class EventDisplay(Display):
    """A display that shows nothing: it writes what it is told to stdout, as lines for `show`. Warnings go to stderr."""

    _advanced_s = 0.0

    def note(self, text: str = "", indent: int = 0) -> None:
        """Send a line of text."""
        self._send("note", text, indent)

    def start(self, total_steps: int | None, done_steps: int, share_done: float) -> None:
        """Send that training begins."""
        self._send("start", total_steps, done_steps, share_done)

    def advance(self, step: int) -> None:
        """Send that a step is done, a few times a second."""
        now_s = time.monotonic()
        if now_s - self._advanced_s >= 1 / _ADVANCES_PER_S:
            self._advanced_s = now_s
            self._send("advance", step)

    def line(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl."""
        self._send("line", line)

    def saved(self, path: Path) -> None:
        """Send a complete checkpoint."""
        self._send("saved", str(path))

    def stop(self) -> None:
        """Send that training has ended."""
        self._send("stop")

    def _send(self, *event: Any) -> None:
        if self._enabled:
            output = self._console.file
            output.write(f"{_MARK}{json.dumps(event)}\n")
            output.flush()


def show(display: Display, text: str) -> None:
    """Show a line that a process with an EventDisplay has written: an event, or any other text."""
    if not text.startswith(_MARK):
        display.note(text)
        return
    name, *arguments = json.loads(text.removeprefix(_MARK))
    assert name in _EVENTS, text
    if name == "saved":
        arguments = [Path(arguments[0])]
    getattr(display, name)(*arguments)
