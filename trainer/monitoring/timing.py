"""Timer: seconds of a run by activity, on rank 0, from the start of its process.

A mark reads the host's clock, in a third of a microsecond. A GPU runs asynchronously: there, one step in fifty also records
CUDA events, which are read when they have passed. Nothing ever waits for the device.
"""

import time
from itertools import pairwise
from typing import Any, Literal

import torch

Activity = Literal["data", "forward", "backward", "communication", "optimizer", "evaluation", "checkpoint", "other"]
_ON_DEVICE: tuple[Activity, ...] = ("forward", "backward", "communication", "optimizer")
_SAMPLED_STEPS = 50  # one of so many is sampled, on a GPU
# Of each fifty. The first steps do one-time work: they load kernels, cuDNN tries some, the optimizer creates its state.
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
    """Attributes the time since the last mark to an activity."""

    def __init__(self, device_type: str):
        """`device_type`: cpu or cuda."""
        self._on_gpu = device_type == "cuda"
        self.seconds: dict[str, float] = dict.fromkeys(Activity.__args__, 0.0)  # type: ignore[attr-defined]
        self.steps = 0
        self._device_s: dict[str, float] = dict.fromkeys(_ON_DEVICE, 0.0)
        self._sampled = 0
        self._events: list[tuple[Activity, Any]] | None = None  # of the present step, if it is sampled
        self._pending: list[tuple[Activity, Any]] = []  # of a sampled step that the device has not finished
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Begin to measure."""
        self._mark = time.perf_counter()

    def mark(self, activity: Activity) -> None:
        """Attribute the time since the last mark to an activity."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._mark
        self._mark = now
        if self._events is not None:
            self._events.append((activity, _recorded_event()))

    def begin_step(self) -> None:
        """Begin a training step; the time before it is no part of it."""
        self.mark("other")
        if self._on_gpu:
            self._pending, self._events = self._events or self._pending, None
            self._read_events()
            if self.steps % _SAMPLED_STEPS == _SAMPLED_STEP and not self._pending:
                self._events = [("other", _recorded_event())]
        self.steps += 1

    def _read_events(self) -> None:
        """Read the events of a sampled step, once the device has finished it."""
        if not self._pending or not self._pending[-1][1].query():
            return
        self._sampled += 1
        for (_, before), (activity, event) in pairwise(self._pending):
            if activity in self._device_s:
                self._device_s[activity] += before.elapsed_time(event) / 1000  # ms
        self._pending = []

    def time_s(self, to_device_s: float, augment_s: float, exposed_s: float | None) -> dict[str, float]:
        """Return seconds by activity, as in summary.json; `total` is their sum.

        Args:
            to_device_s, augment_s: parts of the time of data.
            exposed_s: mean time that a backward pass waits for the other ranks' gradients after its own are ready; None
                with one rank.
        """
        found = dict(self.seconds)
        total = sum(found.values())
        if self._sampled:  # the host only measures the launch of kernels
            device = {name: value / self._sampled * self.steps for name, value in self._device_s.items()}
            # A sampled step may be slower than most, and the device computes while the host reads data: limit to the total.
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
    """Write a table of what Timer.time_s returns, without activities that took less than 0.1 %."""
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
