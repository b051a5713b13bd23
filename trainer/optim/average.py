"""Averages of the weights over the steps, which are evaluated and kept in place of the weights themselves.

Keyword arguments are the options of the recipe's section `average`. Parameters are averaged; buffers, such as batch norm's
running statistics, are averages already, and stay what they are. An average is kept in float32 at least, whatever the format
of the weights: half formats have 8 or 11 bits, and would lose most of what 0.002 of a difference adds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shardstep.configs.durations import Duration, Progress, duration_problems
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.state import TrainState

Tensors = list[torch.Tensor]


def none(slow: Tensors, fast: Tensors, share_done: float) -> None:
    """No average."""


def ema(
    slow: Tensors, fast: Tensors, share_done: float, *, decay: float = 0.998, rise: float = 0.0, every: str = "1 steps"
) -> None:
    """An exponential moving average beside the training: a <- decay a + (1 - decay) w. Polyak and Juditsky 1992.

    With rise r, the decay of a step is decay times (share of the run done)^r: early weights are forgotten sooner.
    """
    weights = [value.to(kept.dtype) for kept, value in zip(slow, fast, strict=True)]
    torch._foreach_lerp_(slow, weights, 1 - decay * share_done**rise)


def lookahead(
    slow: Tensors, fast: Tensors, share_done: float, *, decay: float = 0.5, rise: float = 0.0, every: str = "5 steps"
) -> None:
    """The same, and the training goes on from the average: w <- a. Zhang et al. 2019, arXiv 1907.08610.

    The speed records' lookahead is decay 0.774 (0.95^5), every 5 steps, rise 3.
    """
    ema(slow, fast, share_done, decay=decay, rise=rise)
    torch._foreach_copy_(fast, slow)


AVERAGES: dict[str, Callable[..., None]] = {"none": none, "ema": ema, "lookahead": lookahead}
"""Take the weights of a step into their average, in place; `every` is when, and read by Average."""


class Average:
    """Keeps `state.average` up to date; with the name none it does nothing."""

    def __init__(self, section: dict[str, Any], plan: Plan):
        """`section`: the recipe's, checked."""
        self._function, self._plan = AVERAGES[section["name"]], plan
        self._options = {key: section[key] for key in section if key not in ("name", "every")}
        self._every = Duration.parse(section["every"]) if "every" in section else None

    def begin(self, state: TrainState) -> None:
        """Begin with the weights as they are."""
        if self._every:
            state.average = {
                name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
                for name, value in state.module.named_parameters()
            }

    @torch.no_grad()
    def update(self, state: TrainState, before: Progress) -> None:
        """Take the weights of a step in, if that is due."""
        if self._every and self._plan.is_due(self._every, before, state.progress):
            assert state.average is not None
            slow, fast = list(state.average.values()), _parameters(state)
            self._function(slow, fast, self._plan.duration_done(state.progress), **self._options)


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The model with the average for weights, if there is one, and with its own again behind."""
    if state.average is None:
        yield
        return
    with torch.no_grad():
        fast = _parameters(state)
        own = [value.clone() for value in fast]
        torch._foreach_copy_(fast, list(state.average.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(fast, own)


def check_average(section: dict[str, Any]) -> list[str]:
    """Problems of the section's values that its types do not show."""
    return duration_problems({"average.every": section["every"]} if "every" in section else {})


def _parameters(state: TrainState) -> Tensors:
    return list(state.module.parameters())
