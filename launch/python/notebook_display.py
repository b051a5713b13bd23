"""The output of a run in a notebook: notes as text, and one area that is updated in place."""

import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.status import describe_line

_REDRAWN_PER_S = 4


def in_notebook() -> bool:
    """Return whether this process is a kernel, which shows HTML and updates it; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) is not None if ipython else False


class NotebookDisplay(Display):
    """A display that draws a bar and the newest metrics into an output of the cell."""

    def __init__(self) -> None:
        super().__init__(enabled=True, drops_output=True)
        self._output: Any = None  # IPython's handle of the area
        self._drawn_s = -float("inf")

    def start(self, total_steps: int | None, done_steps: int, share_done: float) -> None:
        """Open the area; the arguments are as in Status."""
        from IPython.display import display

        super().start(total_steps, done_steps, share_done)
        self._output = display(self._content(), raw=True, display_id=True)

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self.status.step = step
        self._draw()

    def line(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl: in the area, and as text if it is about an evaluation."""
        self.status.take(line)
        if line["kind"] == "eval":
            self.note(describe_line(line))
        self._draw()

    def saved(self, path: Path) -> None:
        """Note a complete checkpoint, by its folder."""
        super().saved(path)
        self._draw()

    def stop(self) -> None:
        """Leave the area as it is now."""
        if self._output:
            self._output.update(self._content(), raw=True)
            self._output = None

    def _draw(self) -> None:
        now_s = time.monotonic()
        if self._output and now_s - self._drawn_s >= 1 / _REDRAWN_PER_S:
            self._drawn_s = now_s
            self._output.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        now_s = time.time()
        text = "\n".join([self.status.place(now_s).strip(), *self.status.rows(now_s)]).strip()
        bar = f'<progress value="{self.status.share:.3f}" max="1" style="width: 24em"></progress>'
        return {"text/plain": text, "text/html": f"{bar}<pre>{escape(text)}</pre>"}
