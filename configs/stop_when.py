"""train.stop_when: the rule by which a run ends before its duration, because it no longer improves."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shardstep.configs.components import neighbours
from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.schema import DataConfig

METRICS = ("loss", "accuracy", "top5", "map", "f1", "f1_micro")
_SETS = ("validation", "test")


@dataclass(frozen=True)
class StopWhen:
    """A run ends at the first evaluation that is `patience` after the best one.

    Attributes:
        metric: one of METRICS; the loss is best where it is least, all others where they are largest.
        on: the set that is evaluated: validation or test.
        min_delta: an evaluation is better only if it is by more than this.
    """

    patience: Duration
    metric: str = "loss"
    on: str = "validation"
    min_delta: float = 0.0

    def __str__(self) -> str:
        better = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"{self.on} {self.metric} has not improved{better} for {self.patience}"


def parse_stop_when(value: Any) -> StopWhen | None:
    """Parse train.stop_when; None if there is no such rule.

    Raises:
        InputError: it is not one; the message begins with the key.
    """
    if value is None:
        return None
    keys = [field.name for field in fields(StopWhen)]
    if isinstance(value, Mapping):  # YAML reads a key `on` without quotes as true
        value = {"on" if key is True else key: content for key, content in value.items()}
    if not isinstance(value, Mapping) or "patience" not in value:
        raise InputError(
            f"train.stop_when={value} must be null, or at least a patience: "
            f"{{metric: loss, on: validation, patience: 3 epochs, min_delta: 0.001}}"
        )
    unknown = [str(key) for key in value if key not in keys]
    if unknown:
        raise InputError(f"train.stop_when.{unknown[0]} is not a key; {neighbours(unknown[0], keys)}")
    for key, known in (("metric", METRICS), ("on", _SETS)):
        if value.get(key, known[0]) not in known:
            raise InputError(f"train.stop_when.{key}={value[key]} is unknown; {neighbours(str(value[key]), known)}")
    delta = value.get("min_delta", 0.0)
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta < float("inf"):
        raise InputError(f"train.stop_when.min_delta={delta} must be a number from 0")
    try:
        patience = Duration.parse(str(value["patience"]))
    except InputError as error:
        raise InputError(f"train.stop_when.patience: {error}") from None
    return StopWhen(**{**value, "patience": patience, "min_delta": float(delta)})


def stop_when_problems(value: Any, data: DataConfig) -> list[str]:
    """Check train.stop_when, and that the set which it goes by is evaluated during training."""
    try:
        rule = parse_stop_when(value)
    except InputError as error:
        return [str(error)]
    if rule is None:
        return []
    evaluated = "test" if data.validation is None and data.fold is None else "validation"
    if rule.on == evaluated:
        return []
    if evaluated == "validation":
        return [
            "train.stop_when.on=test: with a validation set, the test set is evaluated only at the end; use validation"
        ]
    return [
        "train.stop_when.on=validation needs a validation set: data.validation=0.1 holds out a tenth of the training set; "
        "on: test goes by the test set, whose result is then too good"
    ]
