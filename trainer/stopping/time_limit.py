"""The end of the allocation: save in time, begin no evaluation that cannot finish, estimate how many more jobs a run needs.

Only rank 0 uses this; the other ranks learn its decision when they agree on stops.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from shardstep.configs.text import count, duration
from shardstep.trainer.distributed.launch_env import Allocation

_MARGIN_S = 20.0  # for clocks that differ, and for the ranks to leave
_FIRST_SAVE_S = 5.0  # assumed until one has been measured
_RECENT = 30  # intervals between checks of stop requests that count
_OUTLOOK_AFTER_S = 60.0  # of training: earlier, the pace is not known
_SLOWER = 1.5  # how many times longer than measured the next save or evaluation may take


class TimeLimit:
    """Compares the time left in an allocation with the time that a clean end needs. No allocation, no limit."""

    def __init__(
        self,
        allocation: Allocation | None,
        save_s: Callable[[], float | None],
        share_done: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ):
        """`save_s` returns the longest time that a checkpoint has taken, None before the first; `share_done`: 0 to 1."""
        self._allocation, self._save_s, self._share_done, self._clock = allocation, save_s, share_done, clock
        self._intervals_s: deque[float] = deque(maxlen=_RECENT)
        self._outlook_given = False
        self._began_s, self._share_at_start = clock(), share_done()

    def note_interval(self, seconds: float) -> None:
        """Note the time between two checks of stop requests: that of one step, or of several quick ones."""
        self._intervals_s.append(seconds)

    def needed_s(self) -> float:
        """Return the seconds that a clean end needs: two intervals, because this check may have come just too early; two
        saves, because one may be under way; and a margin.
        """
        interval_s, save_s = max(self._intervals_s, default=0.0), self._save_s()
        return _SLOWER * 2 * (interval_s + (_FIRST_SAVE_S if save_s is None else save_s)) + _MARGIN_S

    def is_near(self, evaluation_s: float = 0.0) -> bool:
        """Return whether it is time to save and stop, or would be after an evaluation of so many seconds."""
        if self._allocation is None:
            return False
        return self._allocation.end_s - self._clock() < self.needed_s() + _SLOWER * evaluation_s

    def outlook(self) -> str | None:
        """Describe how much of the run is done and how many more jobs like this one it needs; None without an allocation."""
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
        """Return the outlook once, if the first minute of training shows that this job is too short for the run."""
        now = self._clock()
        if self._allocation is None or self._outlook_given or now - self._began_s < _OUTLOOK_AFTER_S:
            return None
        self._outlook_given = True
        gained = self._share_done() - self._share_at_start
        if gained > 0 and now + (1 - self._share_done()) / gained * (now - self._began_s) < self._allocation.end_s:
            return None
        return self.outlook()

    def remaining_s(self) -> float | None:
        """Return the seconds until the allocation ends; None where time is not limited."""
        return None if self._allocation is None else self._allocation.end_s - self._clock()


def jobs_needed(done_before: float, done: float, elapsed_s: float, usable_s: float) -> int | None:
    """Estimate how many more jobs a run needs.

    Args:
        done_before, done: share of the run that was done when this job began to train, and that is done now.
        usable_s: seconds of a job that are left for training.

    Returns:
        None if this job has made no progress, or has no time to.
    """
    if done <= done_before or usable_s <= 0:
        return None
    per_job = (done - done_before) / elapsed_s * usable_s
    return math.ceil((1 - done) / per_job - 1e-9)


def jobs_text(jobs: int, length_s: float) -> str:
    """Return such as "2 more jobs of 4 h 0 min"."""
    return f"{count(jobs, 'more job')} of {duration(length_s)}"
