"""Averages of the weights over the steps; evaluations and the final weights use the average instead of the weights.

Keyword arguments are the options of the recipe's section `average`. Only parameters are averaged; buffers, such as batch
norm's running statistics, are averages already. An average is in float32 or more, whatever the format of the weights: bf16
and fp16 have 8 and 11 bits, and would lose most of an update of 0.002 times a difference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from shardstep.configs.durations import Duration, Progress, duration_problems
from shardstep.configs.imported import call, is_import_path, load_function
from shardstep.trainer.optim.optimizers import evaluates_other_weights
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.state import TrainState

Tensors = list[torch.Tensor]


def none(slow: Tensors, fast: Tensors, share_done: float) -> None:
    """No average."""


def ema(
    slow: Tensors, fast: Tensors, share_done: float, *, decay: float = 0.998, rise: float = 0.0, every: str = "1 steps"
) -> None:
    """Exponential moving average of the weights: a <- decay a + (1 - decay) w. Polyak and Juditsky 1992.

    With rise r, the decay at a step is decay times (share of the run done)^r, so that early weights are forgotten sooner.
    """
    weights = [value.to(kept.dtype) for kept, value in zip(slow, fast, strict=True)]
    torch._foreach_lerp_(slow, weights, 1 - decay * share_done**rise)


def lookahead(
    slow: Tensors, fast: Tensors, share_done: float, *, decay: float = 0.5, rise: float = 0.0, every: str = "5 steps"
) -> None:
    """The same average, from which training then continues: w <- a. Zhang et al. 2019, arXiv 1907.08610.

    The CIFAR-10 speed records use decay 0.774 (0.95^5), every 5 steps, rise 3.
    """
    ema(slow, fast, share_done, decay=decay, rise=rise)
    torch._foreach_copy_(fast, slow)


AVERAGES: dict[str, Callable[..., None]] = {"none": none, "ema": ema, "lookahead": lookahead}
"""Functions that update the average with the weights of a step, in place. Average reads the option `every`."""


class Average:
    """Keeps `state.average` up to date; does nothing with average.name=none."""

    def __init__(self, section: dict[str, Any], plan: Plan):
        """`section`: average of the checked recipe."""
        self._function, self._plan = average_of(section["name"]), plan
        self._options = {key: section[key] for key in section if key not in ("name", "every")}
        self._every = Duration.parse(section["every"]) if "every" in section else None

    def begin(self, state: TrainState) -> None:
        """Start the average with the current weights."""
        if self._every:
            state.average = {
                name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
                for name, value in state.module.named_parameters()
            }

    @torch.no_grad()
    def update(self, state: TrainState, before: Progress) -> None:
        """Update the average with the weights of a step, if that is due."""
        if self._every and self._plan.is_due(self._every, before, state.progress):
            assert state.average is not None
            slow, fast = list(state.average.values()), [*state.module.parameters()]
            self._function(slow, fast, self._plan.duration_done(state.progress), **self._options)


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Replace the model's weights by those to evaluate inside the block, if they are others; restore them after it, exactly.

    They are the average, or what the optimizer puts in place: a schedule-free one averages by itself.
    """
    optimizer: Any = getattr(state.optimizer, "optimizer", None)  # of Accelerate's wrapper
    switches = evaluates_other_weights(optimizer)
    if state.average is None and not switches:
        yield
        return
    with torch.no_grad():
        fast: Tensors = list(state.module.parameters())
        own = [value.clone() for value in fast]
        if state.average is not None:
            torch._foreach_copy_(fast, list(state.average.values()))
        else:
            optimizer.eval()
        try:
            yield
        finally:
            if switches:
                optimizer.train()
            torch._foreach_copy_(fast, own)  # switching back rounds


def weights_to_evaluate(state: TrainState) -> dict[str, torch.Tensor] | None:
    """Return a model's parameters as they are evaluated, by name; None if they are those that it trains with."""
    if state.average is not None or not evaluates_other_weights(getattr(state.optimizer, "optimizer", None)):
        return state.average
    with averaged(state):
        return {name: value.detach().clone() for name, value in state.module.named_parameters()}


def average_of(name: str) -> Callable[..., None]:
    """Return the function of an average's name."""
    return partial(call, f"average.name={name}", load_function(name)) if is_import_path(name) else AVERAGES[name]


def check_average(section: dict[str, Any]) -> list[str]:
    """Return the problems of the section's values that their types do not show."""
    if is_import_path(section["name"]) and not isinstance(section.get("every"), str):
        return [
            f"average.name={section['name']} needs the option every: str = '1 steps', which says when it is updated"
        ]
    return duration_problems({"average.every": section["every"]} if "every" in section else {})
