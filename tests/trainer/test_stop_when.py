"""train.stop_when: a run ends by what it learns, the same on any number of ranks and after any kill."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.durations import Progress
from shardstep.configs.errors import InputError
from shardstep.configs.schema import DataConfig
from shardstep.configs.stop_when import StopWhen, parse_stop_when, stop_when_problems
from shardstep.trainer.state import TrainState
from shardstep.trainer.stopping.patience import Patience
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_ranks, write_recipe

# With a rate of 0 nothing improves: the first evaluation is the best one.
STANDING = {"optimizer": {"name": "sgd", "lr": 0.0}, "eval": {"every": "1 steps"}}
RULE = {"patience": "3 steps", "on": "test"}


def standing(folder: Path, shards: Path, rule: dict[str, Any], **train: Any) -> Path:
    sections = {**STANDING, "train": {"duration": "4 epochs", "stop_when": rule, **train}}
    return write_recipe(folder, shards, **sections)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def watch(rule: StopWhen, values: list[float], samples_per_epoch: int = 10) -> int | None:
    """Return at which of the evaluations, one each 5 samples, the rule ends a run."""
    state = TrainState(None, None, None)  # type: ignore[arg-type]
    patience = Patience(rule, samples_per_epoch)
    for number, value in enumerate(values, 1):
        epoch, position = divmod(5 * number, samples_per_epoch)
        state.progress = Progress(number, epoch, position, 5 * number)
        patience.note(state, {rule.metric: value})
        state.patience = json.loads(json.dumps(state.patience))  # as a checkpoint keeps it
        if patience.is_over(state):
            return number
    return None


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("2 steps", [3, 2, 1, 1, 1, 1], 5),
        ("2 steps", [3, 2, 1, 1.5, 0.9, 0.8], None),
        ("1 epochs", [3, 2, 1, 1, 1, 1], 5),
        ("1.5 epochs", [3, 2, 1, 1, 1, 1], 6),
        ("1 steps", [3, 4], 2),
        ("3 steps", [3, 4, 5], None),
        ("2 steps", [float("inf"), 3, 2], None),
    ],
)
def test_the_rule_ends_a_run_a_patience_after_its_best_evaluation(
    rule: str, values: list[float], expected: int | None
) -> None:
    parsed = parse_stop_when({"patience": rule})
    assert parsed is not None
    assert watch(parsed, values) == expected
    accuracy = replace(parsed, metric="accuracy")
    assert watch(accuracy, [-value for value in values]) == expected


def test_small_improvements_do_not_count() -> None:
    rule = parse_stop_when({"patience": "3 steps", "min_delta": 0.1})
    assert rule is not None
    assert watch(rule, [1.0, 0.95, 0.91, 0.9]) == 4
    assert watch(rule, [1.0, 0.95, 0.89, 0.85]) is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_ends_early(world_size: int, shards: Path, tmp_path: Path) -> None:
    recipe = standing(tmp_path, shards, RULE)
    found = run_ranks(world_size, failure_of, str(recipe))
    assert {code for code, _, _ in found} == {0}
    output = found[0][1]
    assert re.search(
        r"ended early: test loss has not improved for 3 steps: the best was 2\.\d+ at step 1; the weights are", output
    )
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["step"]) == ("finished", 4)
    assert summary["ended_by"]["key"] == "train.stop_when"
    assert summary["ended_by"]["reason"].startswith("test loss has not improved for 3 steps: the best was")
    evaluations = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [1, 2, 3, 4]
    # Once more: there is nothing to do. With more patience, it goes on.
    ((code, output, _),) = run_ranks(1, failure_of, str(recipe), "run.allow_changes=[train.max_micro_batch]")
    assert code == 0
    assert "nothing to do" in output
    more = ["train.stop_when={patience: 5 steps, on: test}", "run.allow_changes=[train.stop_when]"]
    ((code, _, error),) = run_ranks(1, failure_of, str(recipe), *more[:1])
    assert code == 2
    assert "train.stop_when" in error
    train_ranks(1, recipe, *more)
    assert summary_of(tmp_path)["step"] == 6


def test_the_counter_survives_a_stop(shards: Path, tmp_path: Path) -> None:
    recipe = standing(tmp_path, shards, RULE)
    train_ranks(2, recipe, "train.duration=2 steps")
    assert summary_of(tmp_path)["ended_by"] == {"key": "train.duration", "reason": "2 steps"}
    train_ranks(1, recipe, "run.allow_changes=[train.duration]")
    assert summary_of(tmp_path)["step"] == 4


def test_a_rule_on_the_validation_set(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, shards, **STANDING, data={"validation": 0.2},
        train={"duration": "4 epochs", "stop_when": {"metric": "accuracy", "patience": "1 epochs"}},
    )  # fmt: skip
    train_ranks(1, recipe)
    assert summary_of(tmp_path)["step"] == 4  # 81 samples in batches of 30: the first evaluation, and an epoch after it


def test_a_key_that_yaml_takes_for_true() -> None:
    import yaml

    rule = yaml.safe_load("{metric: accuracy, on: test, patience: 3 epochs}")
    assert parse_stop_when(rule) == parse_stop_when({"metric": "accuracy", "on": "test", "patience": "3 epochs"})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("3 epochs", "train.stop_when=3 epochs must be null, or at least a patience"),
        ({"metric": "loss"}, "must be null, or at least a patience"),
        ({"patience": "3 epochs", "metrc": "loss"}, "train.stop_when.metrc is not a key; did you mean metric"),
        ({"patience": "3 epochs", "metric": "acuracy"}, "metric=acuracy is unknown; did you mean accuracy"),
        ({"patience": "3 epochs", "on": "train"}, "train.stop_when.on=train is unknown"),
        ({"patience": "soon"}, "train.stop_when.patience: 'soon' is not a duration"),
        ({"patience": "3 epochs", "min_delta": -1}, "min_delta=-1 must be a number from 0"),
        ({"patience": "3 epochs", "min_delta": True}, "min_delta=True must be a number from 0"),
    ],
)
def test_rules_that_are_refused(rule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_stop_when(rule)
    assert stop_when_problems(rule, DataConfig())


def test_the_set_must_be_evaluated_during_training() -> None:
    on_validation, on_test = {"patience": "1 epochs"}, {"patience": "1 epochs", "on": "test"}
    assert "needs a validation set: data.validation=0.1" in stop_when_problems(on_validation, DataConfig())[0]
    assert stop_when_problems(on_test, DataConfig()) == []
    held_out = DataConfig(validation=0.1)
    assert stop_when_problems(on_validation, held_out) == []
    assert "the test set is evaluated only at the end" in stop_when_problems(on_test, held_out)[0]


def test_a_metric_that_is_not_measured(shards: Path, tmp_path: Path) -> None:
    recipe = standing(tmp_path, shards, RULE | {"metric": "map"})
    ((code, _, error),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert "train.stop_when.metric=map is not measured in this run, only loss, accuracy, top5" in error
