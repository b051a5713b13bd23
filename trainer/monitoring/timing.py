"""Where the time of a run goes: seconds by activity, on rank 0, from the start of its process.

A mark reads the host's clock, in a third of a microsecond. A GPU works behind the host's back: there, one step in fifty
also leaves events in the device's own queue, which are read when they have passed. Nothing ever waits for the device.
"""

import time
from itertools import pairwise
from typing import Any, Literal

import torch

Activity = Literal["data", "forward", "backward", "communication", "optimizer", "evaluation", "checkpoint", "other"]
_ON_DEVICE: tuple[Activity, ...] = ("forward", "backward", "communication", "optimizer")
_SAMPLED_STEPS = 50  # one of so many, on a GPU
# Of each fifty. The first steps hold what happens once: kernels are loaded, cuDNN tries some, the optimizer gets its state.
_SAMPLED_STEP = 10

_NAMES = {
    "data_wait": "waiting for data",
    "to_device": "host to device",
    "augment": "augmentation",
    "forward": "forward",
    "backward": "backward",
    "communication": "communication",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "other": "the rest",
}


class Timer:
    """Gives the time since the last mark to what was done in it."""

    def __init__(self, device_type: str):
        """`device_type`: cpu or cuda."""
        self._on_gpu = device_type == "cuda"
        self.seconds: dict[str, float] = dict.fromkeys(Activity.__args__, 0.0)  # type: ignore[attr-defined]
        self.steps = 0
        self._device_s: dict[str, float] = dict.fromkeys(_ON_DEVICE, 0.0)
        self._sampled = 0
        self._events: list[tuple[Activity, Any]] | None = None  # of the step under way, if it is a sample
        self._pending: list[tuple[Activity, Any]] = []  # of a sample that the device is still at
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._mark = time.perf_counter()

    def mark(self, activity: Activity) -> None:
        """What has passed since the last mark went into an activity."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._mark
        self._mark = now
        if self._events is not None:
            self._events.append((activity, _recorded_event()))

    def begin_step(self) -> None:
        """A training step begins; what was before it is no part of it."""
        self.mark("other")
        if self._on_gpu:
            self._pending, self._events = self._events or self._pending, None
            self._read_events()
            if self.steps % _SAMPLED_STEPS == _SAMPLED_STEP and not self._pending:
                self._events = [("other", _recorded_event())]
        self.steps += 1

    def _read_events(self) -> None:
        """Read a sample, once the device has come to its end."""
        if not self._pending or not self._pending[-1][1].query():
            return
        self._sampled += 1
        for (_, before), (activity, event) in pairwise(self._pending):
            if activity in self._device_s:
                self._device_s[activity] += before.elapsed_time(event) / 1000  # ms
        self._pending = []

    def time_s(self, to_device_s: float, augment_s: float, exposed_s: float | None) -> dict[str, float]:
        """Seconds by activity, as they stand in summary.json; `total` is their sum.

        Args:
            to_device_s, augment_s: parts of the time that went into data.
            exposed_s: what a backward pass waited for the other ranks' gradients on average, after its own were there; None
                with one rank.
        """
        found = dict(self.seconds)
        total = sum(found.values())
        if self._sampled:  # the host's times of these are those of giving orders
            device = {name: value / self._sampled * self.steps for name, value in self._device_s.items()}
            # A sample may be slower than most, and the device works on while the host reads data: no more than there was.
            left_s = total - sum(found[name] for name in ("data", "evaluation", "checkpoint"))
            scale = min(1.0, left_s / max(sum(device.values()), 1e-9))
            found |= {name: scale * value for name, value in device.items()}
        if exposed_s is not None:
            exposed_s = min(exposed_s * self.steps, found["backward"])
            found["backward"] -= exposed_s
            found["communication"] += exposed_s
        found["data_wait"] = found.pop("data") - to_device_s - augment_s
        found |= {"to_device": to_device_s, "augment": augment_s}
        found["other"] = max(0.0, total - sum(found.values()) + found["other"])
        return {"total": round(total, 3), **{name: round(found[name], 3) for name in _NAMES}}


def time_table(time_s: dict[str, float]) -> list[str]:
    """The lines of a table of what Timer.time_s returns, without what took no time worth a word."""
    total = max(time_s["total"], 1e-9)
    rows = [
        f"  {name:<18}{time_s[key]:>9,.1f} s {time_s[key] / total:>6.1%}"
        for key, name in _NAMES.items()
        if time_s[key] / total >= 0.001
    ]
    return [f"where {total:,.1f} s went", *rows]


def _recorded_event() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
