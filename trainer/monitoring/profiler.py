"""train.profile: record a few steps with torch's profiler, one file per rank."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardstep.configs.errors import InputError

_PATTERN = re.compile(r"steps? (\d+)(?:\s*-\s*(\d+))?")
_MOST_ROWS = 100  # of the table
_MOST_ALLOCATIONS = 100_000  # in a snapshot: several KB each


def parse_steps(text: str) -> tuple[int, int] | None:
    """Parse the first and last step of train.profile, such as "steps 10-20" or "step 10"; None where it is empty.

    Raises:
        InputError: it is of another form.
    """
    if not text:
        return None
    match = _PATTERN.fullmatch(text.strip())
    if not match:
        raise InputError(f'{text!r} is not a range of steps to profile; write "steps 10-20"')
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise InputError(f"{text!r}: steps count from 1, and the last must not come before the first")
    return first, last


class Profiler:
    """Profiles the steps of train.profile, from before their data is read; without any, does nothing.

    Writes to `folder`, by rank: trace-rankN.json.gz, a Chrome trace for Perfetto or chrome://tracing; operations-rankN.txt,
    a table by operation, the longest first; and of memory, on a GPU memory-rankN.pickle, a snapshot for
    pytorch.org/memory_viz, on a CPU memory-rankN.txt, the same table with the largest first.
    """

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, rank: int, on_gpu: bool, note: Callable[[str], None]
    ):
        """`steps`: first and last; `folder`: made when needed; `note`: called with what was written, or why not."""
        self._steps, self._folder, self._rank, self._on_gpu, self._note = steps, folder, rank, on_gpu, note
        self._profile: Any = None

    def begin_step(self, step: int) -> None:
        """Start the profile before its first step, and end it after its last."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step <= last:
            self._start()
        elif self._profile is not None and step > last:
            self.end()

    def end(self) -> None:
        """Write the profile, or say that there is none. A full disk does not fail the run."""
        if self._profile is None:
            if self._steps is not None:
                self._note(f"no profile: steps {self._steps[0]}-{self._steps[1]} were not among those of this start")
            return
        profile, self._profile, self._steps = self._profile, None, None
        profile.stop()
        try:
            self._folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"trace-rank{self._rank}.json.gz"))
            by = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
            operations = profile.key_averages()
            table = operations.table(sort_by=by, row_limit=_MOST_ROWS)
            (self._folder / f"operations-rank{self._rank}.txt").write_text(table + "\n")
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank{self._rank}.pickle"))
            else:
                table = operations.table(sort_by="self_cpu_memory_usage", row_limit=_MOST_ROWS)
                (self._folder / f"memory-rank{self._rank}.txt").write_text(table + "\n")
        except OSError as error:
            self._note(f"the profile could not be written, training continues: {error}")
        else:
            self._note(f"the profile is in {self._folder}: open trace-rank{self._rank}.json.gz at ui.perfetto.dev")
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._profile = torch.profiler.profile(
            activities=activities, profile_memory=True, record_shapes=True, acc_events=True
        )
        self._profile.start()
