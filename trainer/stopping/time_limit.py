"""The end of the allocation: save in time, begin no evaluation that cannot finish, and say how many more jobs a run needs.

All of this happens on rank 0; what it decides reaches the other ranks where they agree on stops.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from shardstep.configs.text import duration
from shardstep.trainer.distributed.launch_env import Allocation

_MARGIN_S = 20.0  # for clocks that differ, and for the ranks to leave
_FIRST_SAVE_S = 5.0  # assumed until one has been measured
_RECENT = 30  # looks at requests whose distance counts
_TELLING_S = 60.0  # of training before something is said about the pace
_SLOWER = 1.5  # how much longer than measured the next save or evaluation may take


class TimeLimit:
    """Compares what is left of an allocation with what ending well has taken so far. Without one there is always time."""

    def __init__(
        self,
        allocation: Allocation | None,
        save_s: Callable[[], float | None],
        share_done: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            allocation: None where time is not limited.
            save_s: the longest time that a checkpoint has taken, None before the first.
            share_done: how much of the run is done, 0 to 1.
            clock: seconds since the epoch.
        """
        self._allocation, self._save_s, self._share_done, self._clock = allocation, save_s, share_done, clock
        self._looks_s: deque[float] = deque(maxlen=_RECENT)
        self._has_told = False
        self._began_s, self._share_at_start = clock(), share_done()

    def looked(self, seconds: float) -> None:
        """Note how long it took from one look at requests to the next: the time of a step, or of several quick ones."""
        self._looks_s.append(seconds)

    def needed_s(self) -> float:
        """Seconds to end well from here on: two steps, in case this look was just too early; two saves, in case one is under
        way; and a margin.
        """
        look_s, save_s = max(self._looks_s, default=0.0), self._save_s()
        return _SLOWER * 2 * (look_s + (_FIRST_SAVE_S if save_s is None else save_s)) + _MARGIN_S

    def is_near(self, evaluation_s: float = 0.0) -> bool:
        """Whether it is time to save and end, or would be after an evaluation of so many seconds."""
        if self._allocation is None:
            return False
        return self._allocation.end_s - self._clock() < self.needed_s() + _SLOWER * evaluation_s

    def outlook(self) -> str | None:
        """How much of the run is done, and how many more jobs like this one it needs; None where nothing can be said."""
        if self._allocation is None:
            return None
        done, now = self._share_done(), self._clock()
        jobs = jobs_needed(
            done_before=self._share_at_start,
            done=done,
            elapsed_s=now - self._began_s,
            usable_s=self._allocation.end_s - self._began_s - self.needed_s(),
        )
        if jobs is None:
            return f"{done:.0%} of the run is done, none of it in this job: a job of this length may be too short"
        more = jobs_text(max(jobs, 1), self._allocation.length_s)  # at least one: an evaluation may be all that is left
        return f"{done:.0%} of the run is done; at this pace the rest takes {more}"

    def early_outlook(self) -> str | None:
        """The outlook, once, when a minute of training has shown that this job does not suffice."""
        now = self._clock()
        if self._allocation is None or self._has_told or now - self._began_s < _TELLING_S:
            return None
        self._has_told = True
        gained = self._share_done() - self._share_at_start
        if gained > 0 and now + (1 - self._share_done()) / gained * (now - self._began_s) < self._allocation.end_s:
            return None
        return self.outlook()

    def remaining_s(self) -> float | None:
        """Seconds until the allocation ends; None where time is not limited."""
        return None if self._allocation is None else self._allocation.end_s - self._clock()


def jobs_needed(done_before: float, done: float, elapsed_s: float, usable_s: float) -> int | None:
    """How many more jobs a run needs.

    Args:
        done_before, done: share of the run that was done when this job began to train, and that is done now.
        elapsed_s: seconds between the two.
        usable_s: seconds of a job that are left for training, after its start and before its end.

    Returns:
        None if this job has come no further, or has no time to.
    """
    if done <= done_before or usable_s <= 0:
        return None
    per_job = (done - done_before) / elapsed_s * usable_s
    return math.ceil((1 - done) / per_job - 1e-9)


def jobs_text(jobs: int, length_s: float) -> str:
    """Such as "2 more jobs of 4 h 0 min"."""
    return f"{jobs} more {'job' if jobs == 1 else 'jobs'} of {duration(length_s)}"
