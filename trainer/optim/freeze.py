"""Freeze parameters at their time, between two steps, so that the backward pass ends before them."""

from collections.abc import Callable
from typing import Any

from shardstep.configs.durations import Duration, Progress
from shardstep.trainer.optim.plan import Plan


class Freezer:
    """Freezes the parameter groups of an optimizer that have a duration `until`."""

    def __init__(self, groups: list[dict[str, Any]], plan: Plan, rewrap: Callable[..., None]):
        """`rewrap` is called after parameters were frozen, because DDP expects a gradient of each parameter that it was
        given; with `compiled_before`: whether it has been called with the same parameters frozen.
        """
        pending = [(Duration.parse(group["until"]), group["params"]) for group in groups if "until" in group]
        self._pending = sorted(pending, key=lambda pair: plan.samples_in(pair[0]))
        self._samples_per_epoch = plan.samples_per_epoch
        self._rewrap = rewrap
        self._compiled_ahead = False

    def freeze_due(self, progress: Progress) -> None:
        """Freeze what is due before the step that begins at `progress`. All ranks, at the same step."""
        due = [pair for pair in self._pending if pair[0].is_over(progress, self._samples_per_epoch)]
        if not due:
            return
        for pair in due:
            self._pending.remove(pair)
            for parameter in pair[1]:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._rewrap(compiled_before=self._compiled_ahead)

    def compile_ahead(self) -> None:
        """Compile the model as it will be after each freezing, so that no step has to wait for the compiler. All ranks."""
        for _, parameters in self._pending:
            for parameter in parameters:
                parameter.requires_grad_(False)
            self._rewrap()
        for _, parameters in self._pending:
            for parameter in parameters:
                parameter.requires_grad_(True)
        if self._pending:
            self._rewrap(compiled_before=True)
        self._compiled_ahead = True
