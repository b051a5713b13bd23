"""At least a hundred kills of real runs, for `make drills`; `python -m tests.kill_drill` does more."""

import random
from pathlib import Path

import pytest

from tests.kill_drill import Moment, drill, random_moments

LAST_OPERATION = 75  # a life begins with about 20 operations, and a save with its verification and pruning has about 30


@pytest.mark.drill
def test_killed_before_every_operation_on_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Killed before the 1st, 2nd, 3rd, ... operation of a life: those of resuming, of a save, and of the next save."""
    operation = 1
    while operation <= LAST_OPERATION:
        moments = [Moment(operation=number) for number in range(operation, LAST_OPERATION + 1)]
        operation += drill(tmp_path / str(operation), shards, 1, moments).total()


@pytest.mark.drill
def test_killed_at_random_moments_on_several_ranks(shards: Path, tmp_path: Path) -> None:
    generator, kills, number = random.Random(0), 0, 0
    while kills < 40:
        world_size = (2, 3, 1)[number % 3]
        kills += drill(tmp_path / str(number), shards, world_size, random_moments(generator, 15)).total()
        number += 1
