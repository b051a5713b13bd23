"""At least a hundred kills of real runs, for `make drills`; `python -m tests.kill_drill` does more."""

import random
from pathlib import Path

import pytest

from tests.kill_drill import Moment, drill, random_moments


@pytest.mark.drill
def test_killed_before_every_operation_on_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """One run, killed before the 1st, the 2nd, the 3rd, ... of its operations, counted anew in each of its lives."""
    assert drill(tmp_path, shards, 1, [Moment(operation=number) for number in range(1, 75)]) >= 50


@pytest.mark.drill
def test_killed_at_random_moments_on_several_ranks(shards: Path, tmp_path: Path) -> None:
    generator, kills, number = random.Random(0), 0, 0
    while kills < 60:
        world_size = (2, 3, 1)[number % 3]
        kills += drill(tmp_path / str(number), shards, world_size, random_moments(generator, 15, 3.0))
        number += 1
