"""Kill a training run again and again, at random moments and at the file operations of its saves, until it ends.

    python -m tests.kill_drill --kills 1000

A run that was killed any number of times must end with the weights and the logged losses of one that was not. The last
lines count where the kills hit.
"""

import argparse
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import context, free_port, join_world
from tests.runs import read_lines, write_recipe

CHECKPOINT_STEPS = 3
_OPERATIONS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
)  # as sys.addaudithook names them

SECTIONS: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
    "optimizer": {"name": "adam", "lr": 0.01},
    "data": {"augment": ["flip", {"name": "translate", "pixels": 2}]},
    "checkpoint": {"every": f"{CHECKPOINT_STEPS} steps", "keep": 2},
    "train": {"duration": "8 epochs", "global_batch_size": 20, "max_micro_batch": 4},
    "eval": {"every": "7 steps"},
}


@dataclass(frozen=True)
class Moment:
    """When a process dies: before its n-th operation on a file of the checkpoints, or in the course of time.

    Attributes:
        share: of the time that the whole run takes when it is left alone; a life goes on where the last one was killed.
        operation: from 1.
    """

    share: float | None = None
    operation: int | None = None


def start(world_size: int, recipe: Path, moment: Moment) -> list[Any]:
    """Start ranks, of which rank 0 dies before the operation of `moment`, if it has one."""
    port = free_port()
    processes = [
        context.Process(target=_train, args=(rank, world_size, port, str(recipe), moment)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_until_killed(world_size: int, recipe: Path, moment: Moment, whole_s: float = 600) -> bool:
    """One life of a run, which takes `whole_s` when it is left alone; returns whether it came to its end."""
    processes = start(world_size, recipe, moment)
    deadline = time.monotonic() + (600 if moment.share is None else moment.share * whole_s)
    while time.monotonic() < deadline and processes[0].is_alive():
        time.sleep(0.005)
    if moment == Moment():
        assert not processes[0].is_alive(), "the run did not come to its end"
    for process in processes:
        process.kill() if processes[0].exitcode != 0 else process.join(20)
        process.join()
    codes = {process.exitcode for process in processes}
    assert codes <= {0, 1, -signal.SIGKILL}, codes
    return codes == {0}


def drill(
    folder: Path, shards: Path, world_size: int, moments: list[Moment], sections: dict[str, Any] = SECTIONS
) -> Counter[str]:
    """Kill a run at each of the moments in turn until it ends, and compare it with one that is left alone.

    Returns:
        Where it was killed, and how often.
    """
    from shardstep.trainer.checkpoints import checkpoint_files

    whole, killed = (write_recipe(folder / name, shards, **sections) for name in ("whole", "killed"))
    began = time.monotonic()
    assert run_until_killed(world_size, whole, Moment())
    whole_s = time.monotonic() - began
    checkpoints, newest, kills, ended = folder / "killed" / "run" / "checkpoints", -1, Counter[str](), False
    for moment in itertools.chain(moments, [Moment()]):
        starts, operation = _last_write(folder / "killed" / "run" / "starts.json"), killed.parent / "operation"
        operation.unlink(missing_ok=True)
        ended = run_until_killed(world_size, killed, moment, whole_s)
        if not ended and moment.operation is not None:
            kills["before " + operation.read_text()] += 1
        elif not ended:
            has_started = _last_write(folder / "killed" / "run" / "starts.json") != starts
            kills["while it trained" if has_started else "while it started"] += 1
        found = [
            path for path in checkpoint_files.list_checkpoints(checkpoints) if not checkpoint_files.problems_of(path)
        ]
        assert found == checkpoint_files.list_checkpoints(checkpoints), (
            "a checkpoint that is not whole has its final name"
        )
        now = checkpoint_files.step_of(found[-1]) if found else -1
        assert now >= newest, f"the newest checkpoint was that of step {newest}, now it is {now}"
        newest = now
        if ended:
            break
    assert ended, "the run did not end when nothing killed it"
    one, other = folder / "whole" / "run", folder / "killed" / "run"
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    compared = ("kind", "step", "epoch", "samples", "loss", "accuracy", "lr", "train_loss", "per_class_accuracy")
    first, second = (
        [{key: line.get(key) for key in compared} for line in read_lines(run / "metrics.jsonl")] for run in (one, other)
    )
    assert first == second
    return kills


def _last_write(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def random_moments(generator: random.Random, count: int) -> list[Moment]:
    """Half of them in time, half at file operations."""
    return [
        Moment(share=generator.uniform(0.05, 0.45)) if generator.random() < 0.5
        else Moment(operation=generator.randint(1, 60))
        for _ in range(count)
    ]  # fmt: skip


def _train(rank: int, world_size: int, port: int, recipe: str, moment: Moment) -> None:
    join_world(rank, world_size, port)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    if rank == 0 and moment.operation is not None:
        _die_before(moment.operation, Path(recipe).parent / "operation")
    from shardstep.launch.train import main

    sys.exit(main([recipe]))


def _die_before(operation: int, note: Path) -> None:
    """Kill this process before its n-th operation on a file of the checkpoints; `note` says which one that was."""
    count = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        if event in _OPERATIONS and "checkpoints" in str(arguments[0]) and next(count) == operation:
            name = re.sub(r"\d+", "N", Path(os.fsdecode(arguments[0])).name)
            note.write_text(f"{event.removeprefix('os.')} {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    """Kill as often as asked for, over worlds of 1, 2 and 3 ranks."""
    from shardstep.datasets.write import write_shards

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator, kills = random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="shardstep-kills-") as name:
        folder = Path(name)
        os.environ["SHARDSTEP_CACHE"] = str(folder / "cache")
        for split, count in (("train", 101), ("test", 53)):
            write_shards(f"synthetic:{count}", split, folder / "shards" / split, samples_per_shard=20)
        for number in itertools.count():
            if kills.total() >= given.kills:
                break
            world_size = 1 + number % 3
            kills += drill(folder / str(number), folder / "shards", world_size, random_moments(generator, 60))
            print(f"run {number} on {world_size} ranks: equal; {kills.total()} kills so far", flush=True)
    for where, times in kills.most_common():
        print(f"{times:6d} {where}")


if __name__ == "__main__":
    main()
