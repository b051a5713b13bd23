"""Train parameters in their time only; the backward pass ends before those that are frozen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardstep.configs.durations import Duration, Progress
from shardstep.trainer.optim.plan import Plan


@dataclass(frozen=True)
class _Timed:
    """Parameters that train from one time on, or until another."""

    parameters: list[nn.Parameter]
    begin: Duration | None
    end: Duration | None


class Freezer:
    """Freezes the parameter groups of an optimizer before their duration `from`, and from their duration `until` on.

    A batch norm whose parameters are frozen keeps its running statistics, and normalises with them.
    """

    def __init__(self, groups: list[dict[str, Any]], plan: Plan, module: nn.Module, rewrap: Callable[..., None]):
        """`rewrap` is called after parameters were frozen or unfrozen, because DDP expects a gradient of each parameter that
        it was given; with `compiled_before`: whether it has been called with the same parameters frozen.
        """
        self._timed = [
            _Timed(group["params"], _parsed(group.get("from")), _parsed(group.get("until")))
            for group in groups
            if group.get("from") or group.get("until")
        ]
        self._plan, self._module, self._rewrap = plan, module, rewrap
        self._trained = [True] * len(self._timed)
        self._compiled_ahead = False

    def set_for(self, progress: Progress) -> None:
        """Freeze and unfreeze what is due before the step that begins at `progress`. All ranks, at the same step."""
        trained = [self._is_trained(timed, progress) for timed in self._timed]
        if trained != self._trained:
            self._set(trained)
            self._rewrap(compiled_before=self._compiled_ahead)

    def compile_ahead(self) -> None:
        """Compile the model as it will be in each phase, so that no step has to wait for the compiler. All ranks."""
        before = self._trained
        for trained in self._phases():
            if trained != before:
                self._set(trained)
                self._rewrap()
        if self._trained != before:
            self._set(before)
            self._rewrap(compiled_before=True)
        self._compiled_ahead = True

    def _is_trained(self, timed: _Timed, progress: Progress) -> bool:
        samples = self._plan.samples_per_epoch
        has_begun = timed.begin is None or timed.begin.is_over(progress, samples)
        return has_begun and not (timed.end and timed.end.is_over(progress, samples))

    def _phases(self) -> list[list[bool]]:
        """Return what trains at the start of the run, and from each later time on at which that changes."""
        in_samples = self._plan.samples_in
        changes = {in_samples(time) for timed in self._timed for time in (timed.begin, timed.end) if time}
        total = in_samples(self._plan.duration)
        return [
            [
                (timed.begin is None or in_samples(timed.begin) <= start)
                and (timed.end is None or in_samples(timed.end) > start)
                for timed in self._timed
            ]
            for start in [0.0, *sorted(change for change in changes if change < total)]
        ]

    def _set(self, trained: list[bool]) -> None:
        frozen = set()
        for timed, trains in zip(self._timed, trained, strict=True):
            for parameter in timed.parameters:
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
                    frozen.add(parameter)
        for layer in self._module.modules():
            if isinstance(layer, _BatchNorm) and (own := set(layer.parameters(recurse=False))):
                layer.train(not own <= frozen)
        self._trained = trained


def _parsed(text: str | None) -> Duration | None:
    return Duration.parse(text) if text else None
