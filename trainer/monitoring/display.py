"""The output of a run: notes, a live area on a terminal, timed lines elsewhere. Only rank 0 prints.

In a batch job's log, or where NO_COLOR is set, it prints plain lines: one for every evaluation, and one about training every
ten seconds. Where metrics are logged more rarely, lines after 10, 20, 40, ... seconds without any give the progress.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardstep.configs.text import duration, printable
from shardstep.datasets.progress import is_drawable
from shardstep.trainer.monitoring.status import Status, describe_line

_PLAIN_INTERVAL_S = 10  # between lines about training steps where there is no terminal; evaluations always get one
_REDRAWN_PER_S = 2


class _Output:
    """A stream that drops text when its disk is full or its reader has left, instead of raising."""

    def __init__(self, stream: TextIO, tell: Callable[[str], None] | None = None):
        """`tell` is called with a message about the first failure."""
        self._stream, self._tell = stream, tell

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop its text."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            tell, self._tell = self._tell, None
            if tell:
                tell(f"standard output cannot be written, training continues without: {error.strerror or error}")


class Display:
    """Output of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, enabled: bool, drops_output: bool = False):
        """`enabled`: on rank 0; `drops_output`: text that cannot be written is dropped, and does not end training."""
        self._enabled = enabled
        output, errors = (_Output(sys.stdout, self.warn), _Output(sys.stderr)) if drops_output else (None, None)
        plain: dict[str, Any] = {"highlight": False, "emoji": False, "force_jupyter": False}
        self._console = Console(file=cast(TextIO | None, output), **plain)
        self._errors = Console(file=cast(TextIO | None, errors), stderr=True, **plain)
        self._live: Live | None = None
        self._last_plain_s = -float("inf")  # when the last line about training was printed
        self._last_said_s = 0.0  # when anything was
        self._patience_s = _PLAIN_INTERVAL_S  # after which a line without metrics gives the progress
        self._remark = ""
        self.status = Status()

    def note(self, text: str = "", indent: int = 0) -> None:
        """Print a line; on a terminal it is wrapped, and the lines below are indented by as many columns."""
        if self._enabled:
            if indent and self._console.file.isatty():
                below = indent * " "
                text = fill(
                    text, self._console.width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
                )
            self._print(self._console, text)

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        if self._enabled:
            self.tell(f"warning: {text}")

    def tell(self, text: str) -> None:
        """Print to stderr, on any rank: what only this rank knows."""
        self._print(self._console if self._live else self._errors, text)

    def start(self, total_steps: int | None, done_steps: int, share_done: float) -> None:
        """Open the live area, on a terminal; the arguments are as in Status."""
        self.status.total_steps, self.status.step, self.status.share_done = total_steps, done_steps, share_done
        self._last_said_s = time.monotonic()
        if self._enabled and is_drawable(self._console):
            self._live = Live(
                get_renderable=self._area, console=self._console, refresh_per_second=_REDRAWN_PER_S, transient=True
            )
            self._live.start()
            self._console.show_cursor(True)  # a killed run could not show it again

    def advance(self, step: int) -> None:
        """Note that a step is done; the live area draws it, elsewhere a line is printed after a while without any."""
        self.status.step = step
        if self._enabled and not self._live and time.monotonic() - self._last_said_s >= self._patience_s:
            self._patience_s *= 2
            self._timed(self.status.place(time.time()).lstrip())

    def line(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        self.status.take(line)
        self._patience_s = _PLAIN_INTERVAL_S
        if line["kind"] == "eval":
            (self.note if self._live else self._timed)(describe_line(line))  # without the time it fits 80 columns
        elif not self._live and time.monotonic() - self._last_plain_s >= _PLAIN_INTERVAL_S:
            self._last_plain_s = time.monotonic()
            self._timed(describe_line(line))

    def saved(self, path: Path) -> None:
        """Note a complete checkpoint, by its folder."""
        with contextlib.suppress(OSError):  # it may be deleted by now
            self.status.saved(int(path.name.removeprefix("step-")), path.stat().st_mtime)

    def remark(self, what: str, since_s: float = 0.0) -> None:
        """Show a remark below the metrics and for how long it is true, once without a terminal; an empty one ends it."""
        said, self._remark = self._remark, f"{what} {duration(since_s)}" if what else ""
        if what and not said.startswith(what) and not self._live:
            self._timed(self._remark)

    def stop(self) -> None:
        """Close the live area."""
        if self._live:
            self._live.stop()
            self._live = None

    def _print(self, console: Console, text: str) -> None:
        console.print(printable(text, keep="\n"), markup=False, soft_wrap=True)

    def _timed(self, text: str) -> None:
        self._last_said_s = time.monotonic()
        self.note(f"{time.strftime('%H:%M:%S')}  {text}")

    def _area(self) -> RenderableType:
        now_s, status = time.time(), self.status
        head = Table.grid(expand=True, padding=(0, 2, 0, 0))
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=1.0, completed=status.share)
        head.add_row(bar, Text(status.place(now_s), no_wrap=True))
        rows = [*status.rows(now_s), *([self._remark] if self._remark else [])]
        return Group(head, *(Text(row, no_wrap=True, overflow="ellipsis") for row in rows))
