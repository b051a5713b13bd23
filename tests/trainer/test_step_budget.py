"""What an optimizer step may cost in addition to the model's operations, counted and not timed."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from tests.distributed import run_ranks
from tests.runs import write_recipe
from tests.trainer.test_evaluation import WAITING, Recorder

FIRST, STEPS = 3, 5  # operations are counted in so many steps from here on, calls in as many after them


def count_steps(recipe: str) -> tuple[Counter[str], Counter[str]]:
    """Runs in a rank: the operations of some steps in a row, and how often they call functions of ours, by name."""
    from shardstep.launch.train import main
    from shardstep.trainer import loop

    root, train_step = Path(loop.__file__).parent.parent, loop.train_step
    ours = tuple(f"{root}/{folder}/" for folder in ("configs", "datasets", "trainer", "launch"))
    calls: Counter[str] = Counter()
    recorder = Recorder()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            calls[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    def counted(run: Any, batch: Any) -> Tensor | None:
        step = run.state.progress.step + 1
        if step == FIRST:
            recorder.__enter__()
        if step == FIRST + STEPS:
            recorder.__exit__(None, None, None)
            sys.setprofile(count)
        if step == FIRST + 2 * STEPS:
            sys.setprofile(None)
        return train_step(run, batch)

    loop.train_step = counted
    assert main([recipe]) == 0
    return recorder.names, calls


def test_a_step_makes_the_host_wait_for_nothing_and_calls_little(shards: Path, tmp_path: Path) -> None:
    never = {"every": "1000 epochs"}
    recipe = write_recipe(
        tmp_path,
        shards,
        train={"global_batch_size": 5, "duration": "1 epochs"},
        log=never,
        eval=never,
        checkpoint=never,
    )  # 20 steps of one micro-step
    names, calls = run_ranks(1, count_steps, str(recipe))[0]
    assert "aten.addmm.default" in names  # they are recorded
    assert names.keys() & WAITING == {"aten.lift_fresh.default"}
    assert names["aten.lift_fresh.default"] == STEPS  # the numbers of a batch's samples, sent to the device
    assert calls["train_step"] == STEPS
    assert sum(calls.values()) / STEPS <= 120, calls.most_common(40)  # 105 when this was written
