"""Ends a run that no longer improves: train.stop_when."""

from collections.abc import Mapping
from dataclasses import asdict

from shardstep.configs.durations import Progress
from shardstep.configs.errors import InputError
from shardstep.configs.stop_when import StopWhen
from shardstep.trainer.state import TrainState


class Patience:
    """Watches the evaluations of a run. What it remembers is in the state, and so in every checkpoint."""

    def __init__(self, rule: StopWhen | None, samples_per_epoch: int):
        self._rule, self._samples_per_epoch = rule, samples_per_epoch

    def note(self, state: TrainState, scores: Mapping[str, float | None]) -> None:
        """Note an evaluation at the state's progress; the same on all ranks, as its scores are.

        Raises:
            InputError: it has no such metric.
        """
        if self._rule is None:
            return
        value = scores.get(self._rule.metric)
        if value is None:
            known = ", ".join(name for name, score in scores.items() if score is not None)
            raise InputError(f"train.stop_when.metric={self._rule.metric} is not measured in this run, only {known}")
        now = asdict(state.progress)
        best = state.patience["best"] if state.patience else None
        sign = -1 if self._rule.metric == "loss" else 1
        if best is None or sign * (value - best) > self._rule.min_delta:
            state.patience = {"best": value, "since": now, "now": now}
        else:
            state.patience = {**(state.patience or {}), "now": now}

    def is_over(self, state: TrainState) -> bool:
        """Return whether the last evaluation noted was a patience or more after the best one."""
        if self._rule is None or state.patience is None:
            return False
        since, now = (Progress(**state.patience[name]) for name in ("since", "now"))
        if now.step != state.progress.step:  # training went on, under another rule
            return False
        passed = Progress(
            now.step - since.step, now.epoch - since.epoch, now.position - since.position, now.samples - since.samples
        )
        return self._rule.patience.is_over(passed, self._samples_per_epoch)

    def reason(self, state: TrainState) -> str | None:
        """Say why the run is over; None if it is not, or not for this."""
        if self._rule is None or state.patience is None or not self.is_over(state):
            return None
        best, step = state.patience["best"], state.patience["since"]["step"]
        return f"{self._rule}: the best was {best:.4g} at step {step:,}"
