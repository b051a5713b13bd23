from fractions import Fraction

import pytest

from shardstep.configs.durations import Duration, Progress
from shardstep.configs.errors import InputError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10 epochs", Fraction(10), "epochs"),
        ("8.5 epochs", Fraction(17, 2), "epochs"),
        ("1 epoch", Fraction(1), "epochs"),
        ("200 steps", Fraction(200), "steps"),
        ("1step", Fraction(1), "steps"),
        ("0.1 epochs", Fraction(1, 10), "epochs"),
    ],
)
def test_parse(text: str, value: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize("text", ["10", "epochs", "-1 epochs", "0 steps", "1.5 steps", "1e3 steps", "3 hours", ""])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError):
        Duration.parse(text)


def test_a_tenth_of_an_epoch_is_due_ten_times_an_epoch() -> None:
    # 100 samples in steps of 3: boundaries at 10, 20, ... 100 are crossed once each, without floating-point drift
    every, due, before = Duration.parse("0.1 epochs"), 0, Progress()
    while before.epoch < 1:
        position = before.position + 3
        after = Progress(before.step + 1, int(position >= 100), 0 if position >= 100 else position, before.samples + 3)
        due += every.is_due(before, after, samples_per_epoch=100)
        before = after
    assert due == 10


def test_due_in_steps() -> None:
    every = Duration.parse("3 steps")
    assert [step for step in range(1, 10) if every.is_due(Progress(step=step - 1), Progress(step=step), 100)] == [
        3,
        6,
        9,
    ]


def test_eight_and_a_half_epochs_end_at_the_first_boundary_at_or_past_it() -> None:
    duration = Duration.parse("8.5 epochs")
    assert not duration.is_over(Progress(epoch=8, position=48), samples_per_epoch=100)
    assert duration.is_over(Progress(epoch=8, position=51), samples_per_epoch=100)
    assert duration.is_over(Progress(epoch=8, position=50), samples_per_epoch=100)
