"""Schedules against torch's, and against values computed by hand; nothing depends on the number of ranks."""

import math

import pytest
import torch

from shardstep.configs.durations import Duration, Progress
from shardstep.trainer.optim.schedules import COMMON_OPTIONS, SCHEDULES, LearningRate

DEFAULTS = {key: default for key, (_, default) in COMMON_OPTIONS.items()}
N, B = 100, 10  # samples per epoch and per step: 10 steps an epoch


def at(step: int) -> Progress:
    epoch, place = divmod(step, 10)
    return Progress(step, epoch, place * B, step * B)


def factors(section: dict, duration: str = "4 epochs", steps: int = 40) -> list[float]:
    rate = LearningRate(DEFAULTS | section, Duration.parse(duration), N, B)
    return [rate.factor(at(step)) for step in range(steps)]


def torch_factors(make: object, steps: int = 40) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


torch_schedules = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("section", "theirs"),
    [
        ({"name": "step", "every": "10 steps", "gamma": 0.5}, lambda o: torch_schedules.StepLR(o, 10, 0.5)),
        ({"name": "step", "every": "1 epochs", "gamma": 0.5}, lambda o: torch_schedules.StepLR(o, 10, 0.5)),
        (
            {"name": "multistep", "milestones": ["5 steps", "2 epochs"], "gamma": 0.1},
            lambda o: torch_schedules.MultiStepLR(o, [5, 20], 0.1),
        ),
        ({"name": "exponential", "gamma": 0.9, "every": "1 steps"}, lambda o: torch_schedules.ExponentialLR(o, 0.9)),
        ({"name": "cosine"}, lambda o: torch_schedules.CosineAnnealingLR(o, 40)),
        ({"name": "cosine", "final": 0.1}, lambda o: torch_schedules.CosineAnnealingLR(o, 40, eta_min=0.1)),
        ({"name": "linear", "final": 0.25}, lambda o: torch_schedules.LinearLR(o, 1.0, 0.25, 40)),
    ],
)
def test_like_torch(section: dict, theirs: object) -> None:
    assert factors(section) == pytest.approx(torch_factors(theirs), rel=1e-9)


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
def test_one_cycle_like_torch(anneal: str) -> None:
    # torch's reaches its end on the last step, ours at the end of the run: 41 steps of theirs are 40 of ours.
    # Its rise ends at step pct_start * total_steps - 1 = 12.
    theirs = torch_factors(
        lambda o: torch_schedules.OneCycleLR(
            o,
            1.0,
            total_steps=41,
            pct_start=13 / 41,
            anneal_strategy="cos" if anneal == "cosine" else anneal,
            cycle_momentum=False,
        )
    )
    ours = factors({"name": "one_cycle", "rise": 12 / 40, "start": 0.04, "final": 4e-6, "anneal": anneal})
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_warm_up_comes_on_top_and_the_rest_begins_after_it() -> None:
    ours = factors({"name": "linear", "warmup": "10 steps", "warmup_start": 0.5})
    assert ours[:11] == pytest.approx([0.5 + 0.05 * step for step in range(10)] + [1.0])
    assert ours[25] == pytest.approx(0.5)  # halfway through the remaining 30 steps
    assert factors({"name": "linear", "warmup": "1 epochs", "warmup_start": 0.5}) == pytest.approx(ours)


def test_epochs_are_counted_in_samples() -> None:
    # with batches of 30, an epoch of 100 has steps of 30, 30, 30 and 10: the last one begins at 0.9 of the epoch
    rate = LearningRate(DEFAULTS | {"name": "linear"}, Duration.parse("1 epochs"), 100, 30)
    found = [rate.factor(Progress(step, 0, 30 * step, 30 * step)) for step in range(4)]
    assert found == pytest.approx([1.0, 0.7, 0.4, 0.1])


def test_every_schedule_is_finite_over_a_run_and_past_it() -> None:
    options = {"step": {"every": "3 steps"}, "multistep": {"milestones": ["7 steps"]}, "exponential": {"gamma": 0.5}}
    from shardstep.configs.components import resolve_options

    for name in SCHEDULES:
        section, problems = resolve_options(
            "schedule", {"name": name, **options.get(name, {})}, SCHEDULES, COMMON_OPTIONS
        )
        assert not problems
        assert all(math.isfinite(value) for value in factors(section, steps=60)), name


def test_a_part_that_ends_early_has_the_complete_schedule_until_then() -> None:
    rate = LearningRate(DEFAULTS | {"name": "linear", "final": 0.0}, Duration.parse("4 epochs"), N, B)
    # 1 epoch is 10 steps: a tenth less with each of them, then nothing
    found = [rate.factor(at(step), "1 epochs") for step in (0, 5, 9, 10, 39)]
    assert found == pytest.approx([1, 0.5, 0.1, 0, 0])
    assert rate.factor(at(20)) == pytest.approx(0.5)
