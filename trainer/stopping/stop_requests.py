"""Stop requests: signals, and files in the run's folder. A rank notes them at once; all ranks obey together between steps.

Nothing here imports torch: the signal handlers are installed before its import, which takes seconds.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from shardstep.trainer.distributed import launch_env
from shardstep.trainer.stopping.time_limit import TimeLimit

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
HELD_BACK = (signal.SIGINT, *_SIGNALS)
"""The signals that `shardstep train --nproc` blocks in the ranks that it starts, until `StopSignal.install` unblocks them
(Ctrl-C: until `raise_interrupts`)."""
_INTERVAL_S = 0.5  # between two checks of files and other ranks
_MOST_CALLS = 100  # between two checks: a GPU's steps seem faster than they are until its queue is full

Agree = Callable[[list[int]], list[int]]
"""An element-wise maximum over all ranks' numbers; every rank calls it."""


class StopSignal:
    """The first signal that asked this process to stop; later ones change nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_listening = False  # to signals
        self._wakeup: int | None = None
        self._parent = launch_env.parent()

    def install(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on, also while the process is still starting.

        Python handles signals in the main thread only: elsewhere, as in Ray Train, this notes only the launcher's end.
        """
        # A handler runs between two lines of Python, which a hung collective never reaches. The pipe is written at once.
        self._wakeup, written = os.pipe()
        for end in (self._wakeup, written):
            os.set_blocking(end, False)
        self.is_listening = threading.current_thread() is threading.main_thread()
        if self.is_listening:
            for number in _SIGNALS:
                signal.signal(number, self._note)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def note_interrupts(self) -> None:
        """Treat Ctrl-C as a stop request from now on; while the process is starting, it ends the process."""
        if self.is_listening:
            signal.signal(signal.SIGINT, self._note)

    def has_arrived(self) -> bool:
        """Return whether a signal has arrived or the launcher has ended, even if the main thread is stuck."""
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
    """What all ranks have agreed to do: `stop`, `save` and `out_of_time` change in `check`, and are equal on all ranks."""

    def __init__(
        self,
        stop_signal: StopSignal,
        folder: Path,
        is_main: bool,
        agree: Agree,
        time_limit: TimeLimit,
        max_train_s: float | None = None,
    ):
        """Rank 0 looks for the files STOP and SAVE in `folder`, and it alone uses `time_limit` and `max_train_s`."""
        self._signal, self._folder, self._is_main, self._agree = stop_signal, folder, is_main, agree
        self._time_limit, self._max_train_s = time_limit, max_train_s
        self._calls, self._previous_call, self._next_call = 0, 0, 1
        self._previous_s, self._pause = time.monotonic(), 0
        self.stop = False
        self.save = False
        self.out_of_time = False  # train.max_wall_s is over: the run ends as if its duration were
        self.reason = ""  # of the stop, as far as this rank knows
        self.by_person = False  # whether somebody created the file STOP
        self.interrupted = False  # whether somebody pressed Ctrl-C

    def restart(self) -> None:
        """Check at the next call, because what follows has another pace than what came before."""
        self._next_call, self._pause = self._calls + 1, 0

    def check(self, evaluation_s: float = 0.0, train_s: float = 0.0) -> bool:
        """Agree with the other ranks, about twice a second, and return `stop`. Every rank calls it equally often.

        Args:
            evaluation_s: seconds that the next evaluation will take; the run stops if the allocation ends before.
            train_s: seconds of training so far; 0 during an evaluation, which does not count.
        """
        self._calls += 1
        if self.stop or self._calls < self._next_call:
            return self.stop
        stop, save, job_ends, out_of_time = self._signal.has_arrived(), False, False, False
        passed_s = time.monotonic() - self._previous_s
        if self._is_main:
            # os.path.exists does not raise when a mount is gone, which is no reason to end a run
            self.by_person = os.path.exists(self._folder / STOP_FILE)
            save = os.path.exists(self._folder / SAVE_FILE)
            self._time_limit.note_interval(passed_s)
            job_ends = self._time_limit.is_near(evaluation_s)
            stop = stop or self.by_person or job_ends
        seconds_per_call = passed_s / (self._calls - self._previous_call)
        interval_s = _INTERVAL_S
        if self._is_main and self._max_train_s is not None and train_s:
            out_of_time = train_s >= self._max_train_s
            interval_s = min(interval_s, self._max_train_s - train_s)  # check again no later than at the end
        # The number of calls at most doubles, beginning with 1: the first calls may be faster than the steps that follow.
        pause = max(1, min(int(interval_s / max(seconds_per_call, 1e-6)), 2 * self._pause, _MOST_CALLS))
        agreed_stop, agreed_save, agreed_end, self._pause = self._agree(
            [int(stop), int(save), int(out_of_time), pause if self._is_main else 0]
        )
        self.out_of_time = self.out_of_time or bool(agreed_end)
        self._previous_s = time.monotonic()
        self._previous_call, self._next_call = self._calls, self._calls + self._pause
        self.stop, self.save = bool(agreed_stop), bool(agreed_save)
        if self.stop:
            self.interrupted = self._signal.reason == signal.SIGINT.name
            others = f"a file {STOP_FILE}" if self.by_person else "another rank"
            self.reason = self._signal.reason or ("the allocation's end" if job_ends else others)
        return self.stop

    def remove_files(self) -> None:
        """Remove the files whose requests have been obeyed. Rank 0."""
        if self.stop and os.path.exists(self._folder / STOP_FILE):  # perhaps created since the last check
            self.by_person = True
        for name in (SAVE_FILE, *([STOP_FILE] if self.stop else [])):
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
        self.save = False
