"""Requests to stop: signals, and files in the run's folder. Noted at once, obeyed between steps by all ranks together.

Nothing here imports torch: the handlers are installed before the seconds that its import takes.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from shardstep.trainer.distributed import launch_env
from shardstep.trainer.stopping.time_limit import TimeLimit

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_INTERVAL_S = 0.5  # between two looks at files and other ranks
_MOST_CALLS = 100  # between two looks: a GPU's steps look faster than they are, until its queue is full

Agree = Callable[[list[int]], list[int]]
"""The largest of all ranks' numbers, place by place; every rank calls it."""


class StopRequest:
    """What this process was told by signals. A second one changes nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._wakeup: int | None = None
        self._parent = os.getppid()

    def install(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on, even if they come while the process is starting."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        # The handler runs between two lines of Python, which a hung collective never reaches; a pipe is written at once.
        self._wakeup, written = os.pipe()
        for end in (self._wakeup, written):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def note_interrupts(self) -> None:
        """From now on Ctrl-C is a request like the others; while the process is starting it ends it."""
        signal.signal(signal.SIGINT, self._note)

    def has_come(self) -> bool:
        """Whether a signal has arrived, or the launcher is gone, though the main thread may not have come to note it."""
        if self.reason is None and self._wakeup is not None:
            try:
                received = os.read(self._wakeup, 64)
            except BlockingIOError:
                received = b""
            names = [signal.Signals(number).name for number in received if number in (*_SIGNALS, signal.SIGINT)]
            if names:
                self.reason = names[0]
            elif os.getppid() != self._parent and launch_env.ends_with_parent():
                self.reason = "the launcher's end"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name


class StopRequests:
    """What all ranks have agreed to do. `stop` and `save` change between two calls of `check`, on all ranks alike."""

    def __init__(
        self,
        request: StopRequest,
        folder: Path,
        is_main: bool,
        agree: Agree,
        time_limit: TimeLimit,
        max_train_s: float | None = None,
    ):
        """
        Args:
            request: this process's.
            folder: of the run; rank 0 looks for STOP and SAVE in it.
            is_main: whether this is rank 0.
            agree: exchanges numbers with the other ranks.
            time_limit: of the allocation; rank 0 asks it.
            max_train_s: of the recipe; rank 0's clock counts.
        """
        self._request, self._folder, self._is_main, self._agree = request, folder, is_main, agree
        self._time_limit, self._max_train_s = time_limit, max_train_s
        self._calls, self._previous_call, self._next_call = 0, 0, 1
        self._previous_s, self._pause = time.monotonic(), 0
        self.stop = False
        self.save = False
        self.out_of_time = False  # the run's own: it ends as if its duration were over
        self.reason = ""  # of the stop, as far as this rank knows
        self.by_person = False  # whether somebody has put the file STOP there

    def restart(self) -> None:
        """Look again at the next call: what follows takes another time than what was before."""
        self._next_call, self._pause = self._calls + 1, 0

    def check(self, evaluation_s: float = 0.0, train_s: float = 0.0) -> bool:
        """Called equally often on every rank; talks to the others about twice a second. Returns `stop`.

        Args:
            evaluation_s: how long what comes next will take; if the allocation ends before, that is a reason to stop.
            train_s: seconds of training so far; where they do not pass, as in an evaluation, 0.
        """
        self._calls += 1
        if self.stop or self._calls < self._next_call:
            return self.stop
        stop, save, job_ends, out_of_time = self._request.has_come(), False, False, False
        passed_s = time.monotonic() - self._previous_s
        if self._is_main:
            # os.path: a mount that is gone has no such file, and is no reason to end
            self.by_person = os.path.exists(self._folder / STOP_FILE)
            save = os.path.exists(self._folder / SAVE_FILE)
            self._time_limit.looked(passed_s)
            job_ends = self._time_limit.is_near(evaluation_s)
            stop = stop or self.by_person or job_ends
        seconds_per_call = passed_s / (self._calls - self._previous_call)
        # At most twice as many as before, from one on: the first calls may come faster than the steps that follow.
        interval_s = _INTERVAL_S
        if self._is_main and self._max_train_s is not None and train_s:
            out_of_time = train_s >= self._max_train_s
            interval_s = min(interval_s, self._max_train_s - train_s)  # the next look comes no later than the end
        pause = max(1, min(int(interval_s / max(seconds_per_call, 1e-6)), 2 * self._pause, _MOST_CALLS))
        agreed_stop, agreed_save, agreed_end, self._pause = self._agree(
            [int(stop), int(save), int(out_of_time), pause if self._is_main else 0]
        )
        self.out_of_time = self.out_of_time or bool(agreed_end)
        self._previous_s, self._previous_call, self._next_call = (
            time.monotonic(),
            self._calls,
            self._calls + self._pause,
        )
        self.stop, self.save = bool(agreed_stop), bool(agreed_save)
        if self.stop:
            others = f"a file {STOP_FILE}" if self.by_person else "another rank"
            self.reason = self._request.reason or ("the allocation's end" if job_ends else others)
        return self.stop

    def obeyed(self) -> None:
        """Take away the files whose request is fulfilled. Rank 0."""
        if self.stop and os.path.exists(self._folder / STOP_FILE):  # which may have come since the last look
            self.by_person = True
        for name in (SAVE_FILE, *([STOP_FILE] if self.stop else [])):
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
        self.save = False
