"""What the person at the terminal sees: notes, a live bar on a terminal, plain lines elsewhere. Rank 0 only."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_S = 10  # between lines about training steps where there is no terminal; evaluations always get one


class Display:
    """Output of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._last_plain_s = -float("inf")

    def note(self, text: str = "") -> None:
        """Print a line."""
        if self._enabled:
            (self._bar.console if self._bar else self._console).print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        if self._enabled:
            (self._bar.console if self._bar else self._errors).print(f"warning: {text}", markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Print to stderr, on any rank: what this rank alone knows."""
        self._errors.print(text, markup=False, soft_wrap=True)

    def start(self, total_steps: int, done_steps: int) -> None:
        """Open the bar, if there is a terminal."""
        if self._enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._bar.start()
            self._bar.add_task("starting", total=total_steps, completed=done_steps)

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def line(self, line: dict[str, Any], total_steps: int) -> None:
        """Show a line of metrics.jsonl."""
        if not self._enabled:
            return
        if line["kind"] == "eval":
            known = line["accuracy"] is not None
            accuracy = f"accuracy {line['accuracy']:.2%}  (train {_percent(line['train_accuracy'])})  " if known else ""
            self.note(
                f"epoch {line['epoch']:<6.4g} step {line['step']}/{total_steps}  test loss {line['loss']:.4f}  "
                f"{accuracy}{line['wall_s']:.0f} s"
            )
            return
        loss = "left out" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"epoch {line['epoch']:<6.4g} loss {loss}  {line['samples_per_s']:,.0f} images/s  rate {line['lr']:.3g}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=text)
        elif time.monotonic() - self._last_plain_s >= _PLAIN_INTERVAL_S:
            self._last_plain_s = time.monotonic()
            self.note(f"{text}  step {line['step']}/{total_steps}")

    def stop(self) -> None:
        """Close the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
