"""A progress bar for countable work, on stderr: live on a terminal, two plain lines elsewhere."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def is_drawable(console: Console) -> bool:
    """Check that a console is a terminal and NO_COLOR is unset. FORCE_COLOR does not turn a file into a terminal."""
    return console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("NO_COLOR")


@contextlib.contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` units; call the function it yields with the number of units just done."""
    console = Console(stderr=True, highlight=False, emoji=False, force_jupyter=False)
    start = time.perf_counter()
    if not is_drawable(console):
        console.print(f"{what}: {total:,} {unit} ...", soft_wrap=True, markup=False)
        yield lambda done: None
        console.print(f"{what}: {total:,} {unit} in {time.perf_counter() - start:.1f} s", soft_wrap=True, markup=False)
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
