"""Guarantee 7: a stop request loses nothing, whoever gets it and whenever it comes."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardstep.trainer.metrics import LineFile
from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

SECTIONS: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
    "optimizer": {"name": "adam", "lr": 0.01},
    "train": {"duration": "12 steps"},
    "eval": {"every": "5 steps", "batch_size": 10},
    "checkpoint": {"every": "100 steps"},
}


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run on N ranks that nobody asked to stop."""
    runs: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in runs:
            folder = tmp_path_factory.mktemp(f"undisturbed{world_size}")
            train_ranks(world_size, write_recipe(folder, shards, **SECTIONS))
            runs[world_size] = folder / "run"
        return runs[world_size]

    return run


def assert_equal(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    compared = ("kind", "step", "loss", "accuracy", "train_loss")
    lines, again = (
        [{key: line.get(key) for key in compared} for line in read_lines(run / "metrics.jsonl")] for run in (one, other)
    )
    assert lines == again


def disturbed(recipe: str, where: str, step: int, disturb: str, rank: int, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: train, and make something happen on one of the ranks, at a given point of a step.

    Args:
        recipe: to train.
        where: the point: step, evaluation, save or start.
        step: at which it happens.
        disturb: names of signals that the process sends to itself, in turn, or of a file that it creates in the folder.
        rank: on which it happens; -1: on every one.
        overrides: of the recipe.
    """
    from shardstep.trainer import loop, resume
    from shardstep.trainer import run as run_module
    from shardstep.trainer.checkpoints import checkpoint

    def happen() -> None:
        if rank in (-1, int(os.environ["RANK"])):
            for name in disturb.split():
                if name.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, name))
                else:
                    (Path(recipe).parent / "run" / name).touch()

    def before(module: Any, name: str, is_time: Callable[..., bool]) -> None:
        function, happened = getattr(module, name), [False]

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not happened[0] and is_time(*arguments):
                happened[0] = True
                happen()
            return function(*arguments, **options)

        setattr(module, name, wrapped)

    if where == "step":
        before(loop, "train_step", lambda run, batch: run.state.progress.step == step)
    elif where == "save":
        before(checkpoint, "take_snapshot", lambda state, *rest: state.progress.step == step)
    elif where == "start":
        before(resume, "with_choices_of_rank_0", lambda world, recipe: True)  # which all ranks call
    else:
        function = run_module.evaluate

        def evaluate(accelerator: Any, module: Any, batches: Any, *rest: Any) -> Any:
            def passing() -> Iterator[Any]:
                for number, batch in enumerate(batches()):
                    if number == 2:
                        happen()
                    yield batch

            return function(accelerator, module, passing, *rest)

        run_module.evaluate = evaluate
    StopRequests.check = _check_every_time(StopRequests.check)  # type: ignore[method-assign]
    return failure_of(recipe, *overrides)


def _check_every_time(check: Callable[..., bool]) -> Callable[..., bool]:
    """Steps here take a millisecond; make the check that is due twice a second at each of them."""

    def every_time(requests: StopRequests, *arguments: Any, **keywords: Any) -> bool:
        requests._next_call = 0
        return check(requests, *arguments, **keywords)

    return every_time


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP", "SIGTERM SIGINT SIGTERM"])
def test_a_request_saves_the_step_and_the_run_resumes(
    undisturbed: Callable[[int], Path], shards: Path, tmp_path: Path, name: str
) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    ((code, output, _),) = run_ranks(1, disturbed, str(recipe), "step", 6, name, 0)
    assert code == 85
    reason = "a file STOP" if name == "STOP" else name.split()[0]
    assert f"stopped by {reason}: step 7 is saved" in output
    assert (tmp_path / "run" / "checkpoints" / "step-00000007").is_dir()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("preempted", 7)
    assert not (tmp_path / "run" / "STOP").exists()
    train_ranks(1, recipe)
    assert_equal(tmp_path / "run", undisturbed(1))


@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (3, 2), (3, -1)])
def test_ranks_stop_together(
    undisturbed: Callable[[int], Path], shards: Path, tmp_path: Path, world_size: int, rank: int
) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    outcomes = run_ranks(world_size, disturbed, str(recipe), "step", 6, "SIGTERM", rank)
    assert [code for code, _, _ in outcomes] == [85] * world_size
    assert "step 7 is saved" in outcomes[0][1]
    train_ranks(world_size, recipe)
    assert_equal(tmp_path / "run", undisturbed(world_size))


@pytest.mark.parametrize(
    ("where", "step", "rank", "name"),
    [
        ("start", 0, 0, "SIGTERM"),
        ("start", 0, 1, "SIGUSR1"),
        ("step", 0, 1, "SIGUSR1"),
        ("evaluation", 5, 1, "SIGTERM"),
        ("evaluation", 5, -1, "SIGUSR1"),
        ("save", 5, 0, "SIGTERM"),
        ("save", 5, 0, "SIGUSR1"),
        ("step", 11, 1, "SIGTERM"),
        ("step", 11, -1, "SIGUSR1"),
    ],
)
def test_at_any_place(
    undisturbed: Callable[[int], Path], shards: Path, tmp_path: Path, where: str, step: int, rank: int, name: str
) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    outcomes = run_ranks(2, disturbed, str(recipe), where, step, name, rank)
    assert [code for code, _, _ in outcomes] == [85, 85]
    train_ranks(2, recipe)
    assert_equal(tmp_path / "run", undisturbed(2))


def test_a_broken_off_evaluation_leaves_each_rank_its_own_statistics(shards: Path, tmp_path: Path) -> None:
    """Batch norm's are averaged for an evaluation; an interrupted evaluation must not change them."""
    model = {"name": "whitening_cnn", "widths": [8, 8]}
    sections = SECTIONS | {"model": model, "eval": {"every": "5 steps", "batch_size": 4}}
    recipes = [write_recipe(tmp_path / name, shards, **sections) for name in ("whole", "cut")]
    train_ranks(3, recipes[0])
    outcomes = run_ranks(3, disturbed, str(recipes[1]), "evaluation", 5, "SIGTERM", 1)
    assert [code for code, _, _ in outcomes] == [85] * 3
    saved = load_file(tmp_path / "cut" / "run" / "checkpoints" / "step-00000005" / "rank_buffers.safetensors")[
        "buffers"
    ]
    assert not torch.equal(saved[0], saved[1])
    train_ranks(3, recipes[1])
    assert_equal(tmp_path / "cut" / "run", tmp_path / "whole" / "run")


def test_a_save_request_saves_and_training_continues(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS, run={"dir": str(tmp_path / "run")})
    ((code, _, _),) = run_ranks(1, disturbed, str(recipe), "step", 6, "SAVE", 0, "checkpoint.keep=9")
    assert code == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000007").is_dir()
    assert not (tmp_path / "run" / "SAVE").exists()
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 13))


def under_agent(*arguments: Any) -> tuple[int, str, str]:
    """Runs in a rank."""
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    return disturbed(*arguments)


def test_under_an_agent_a_stop_is_no_failure(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    assert [code for code, _, _ in run_ranks(2, under_agent, str(recipe), "step", 3, "SIGTERM", 0)] == [0, 0]


def looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durations: list[float | None]) -> list[int]:
    """Return at which of some calls, so many seconds apart, the ranks communicate; None is a change of phase."""
    now, looks, call = [0.0], [], [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def agree(numbers: list[int]) -> list[int]:
        looks.append(call[0])
        return numbers

    unlimited = TimeLimit(None, save_s=lambda: None, share_done=lambda: 0.0)
    requests = StopRequests(StopSignal(), tmp_path, is_main=True, agree=agree, time_limit=unlimited)
    requests.check()  # before the first step, at once
    for number, duration in enumerate(durations, start=1):
        if duration is None:
            requests.restart()
            continue
        now[0], call[0] = now[0] + duration, number
        requests.check()
    return looks


def test_ranks_look_at_each_other_about_twice_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 38 <= len(looks_at(tmp_path, monkeypatch, [0.05] * 400)) <= 50  # 20 s


def test_slow_calls_after_fast_ones_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first look is milliseconds after the start, and the steps that follow take seconds
    assert looks_at(tmp_path, monkeypatch, [3.0] * 10) == [0, *range(1, 11)]
    # fast steps, then a slow evaluation whose first call comes at once, then fast steps again
    looks = looks_at(tmp_path, monkeypatch, [0.01] * 500 + [None, 0.001] + [2.0] * 10)
    assert looks[-9:] == list(range(504, 513))


def slow_steps(recipe: str) -> tuple[int, str, str]:
    """Runs in a rank: steps of 0.1 s, and a signal in the third."""
    from shardstep.trainer import loop

    function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return function(run, batch)

    loop.train_step = step
    return failure_of(recipe, "train.duration=100 steps")


def test_a_request_is_heard_within_a_second(shards: Path, tmp_path: Path) -> None:
    ((code, _, _),) = run_ranks(1, slow_steps, str(write_recipe(tmp_path, shards, **SECTIONS)))
    assert code == 85
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] <= 15


# --- one rank fails ---------------------------------------------------------------------------------------------------


def failing(recipe: str, rank: int) -> tuple[int, str, str, float]:
    """Runs in a rank: one of them meets bad data at step 4."""
    from shardstep.configs.errors import InputError
    from shardstep.trainer import loop

    function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 4 and run.accelerator.process_index == rank:
            raise InputError("shard train-000003.tar is damaged")
        return function(run, batch)

    loop.train_step = step
    outcome = failure_of(recipe)
    return *outcome, time.time()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_rank_that_failed_prints_first_and_the_others_end(shards: Path, tmp_path: Path, rank: int) -> None:
    began = time.monotonic()
    outcomes = run_ranks(3, failing, str(write_recipe(tmp_path, shards, **SECTIONS)), rank)
    assert time.monotonic() - began < 300  # and not after train.timeout_s
    codes = [code for code, _, _, _ in outcomes]
    assert codes == [2 if place == rank else 1 for place in range(3)]
    assert (
        outcomes[rank][2].splitlines()[-1] == "error: shard train-000003.tar is damaged"
    )  # decoding may tell its progress before
    for place in {0, 1, 2} - {rank}:
        assert outcomes[place][2].splitlines()[-1] == f"failed: rank {place} ends because another rank has ended"
        assert outcomes[place][3] > outcomes[rank][3]


# --- hangs ------------------------------------------------------------------------------------------------------------


def hanging(recipe: str, rank: int) -> None:
    """Runs in a rank: one of them sleeps in step 4."""
    from shardstep.launch.train import main
    from shardstep.trainer import loop

    function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 4 and run.accelerator.process_index == rank:
            time.sleep(600)
        return function(run, batch)

    loop.train_step = step
    with open(Path(recipe).parent / f"stderr{os.environ['RANK']}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    main([recipe, "run.hang_timeout=3"])


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 1)])
def test_a_hang_ends_the_run_and_reports_the_rank(shards: Path, tmp_path: Path, world_size: int, rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died without a word, exit codes .*1"):
        run_ranks(world_size, hanging, str(write_recipe(tmp_path, shards, **SECTIONS)), rank)
    assert time.monotonic() - began < 300  # and not after train.timeout_s
    told = "".join((tmp_path / f"stderr{number}").read_text() for number in range(world_size))
    assert told.count("failed:") == 1
    assert f"failed: rank {rank} has not moved for" in told
    assert "step 4)" in told if world_size == 1 else "computing, step 5" in told
    for number in range(world_size):
        stacks = (tmp_path / "run" / f"hang-rank{number}.txt").read_text()
        # the one that hangs has not come to the step that the others wait in
        assert ("in train_step" in stacks) == (number != rank)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["failure"], summary["step"]) == ("failed", "hang", 4)
    assert f"failed: {summary['reason']}\n" in told
    assert RunDir(tmp_path / "run").state() == "failed"


def left_by_the_ranks_of_a_hung_run(recipe: str) -> None:
    """Runs in a rank: another one has declared the run hung and is gone before this one's watchdog reads its verdict."""
    from shardstep.launch.train import main
    from shardstep.trainer import loop

    function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 4:
            run.watchdog._store.claim_verdict("rank 1 has not moved for 3 s")
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        return function(run, batch)

    loop.train_step = step
    main([recipe, "run.hang_timeout=5"])


def test_a_hang_stays_one_where_another_rank_has_left_first(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a word, exit codes .*1"):
        run_ranks(1, left_by_the_ranks_of_a_hung_run, str(write_recipe(tmp_path, shards, **SECTIONS)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["failure"], summary["reason"]) == ("hang", "rank 1 has not moved for 3 s")


def hanging_before_the_first_step(recipe: str) -> None:
    """Runs in a rank: rank 0 hangs while it writes down its start."""
    from shardstep.launch.train import main
    from shardstep.trainer import finish

    finish.write_start = lambda *arguments: time.sleep(600)
    with open(Path(recipe).parent / f"stderr{os.environ['RANK']}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    main([recipe, "run.hang_timeout=3"])


def test_a_hang_before_the_first_step_ends_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a word, exit codes .*1"):
        run_ranks(2, hanging_before_the_first_step, str(write_recipe(tmp_path, shards, **SECTIONS)))
    for rank in range(2):
        assert (tmp_path / "run" / f"hang-rank{rank}.txt").is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failure"] == "hang"


def hanging_with_a_writer_that_blocks(recipe: str) -> None:
    """Runs in a rank: it hangs, and so does the disk when it writes the summary."""
    from shardstep.trainer import finish

    finish.write_summary = lambda *arguments, **options: time.sleep(600)
    hanging(recipe, 0)


def test_a_summary_that_cannot_be_written_keeps_no_hung_process_alive(shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died without a word, exit codes .*1"):
        run_ranks(1, hanging_with_a_writer_that_blocks, str(write_recipe(tmp_path, shards, **SECTIONS)))
    assert time.monotonic() - began < 60
    assert "failed: rank 0 has not moved for" in (tmp_path / "stderr0").read_text()
    assert not (tmp_path / "run" / "summary.json").exists()


def hanging_after_a_stop(recipe: str) -> None:
    """Runs in a rank: all are asked to stop, and one never reaches the agreement."""
    from shardstep.launch.train import main
    from shardstep.trainer import loop
    from shardstep.trainer.stopping import watchdog

    function, watchdog._STOP_GRACE_S = loop.train_step, 3.0

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            if run.accelerator.process_index == 1:
                time.sleep(600)
        return function(run, batch)

    loop.train_step = step
    with open(Path(recipe).parent / f"stderr{os.environ['RANK']}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    main([recipe])


def test_a_hang_after_a_stop_request_ends_sooner(shards: Path, tmp_path: Path) -> None:
    """run.hang_timeout is ten minutes, but whoever asked for a stop will not wait that long."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS | {"checkpoint": {"every": "2 steps"}})
    with pytest.raises(AssertionError, match="died without a word, exit codes .*1"):
        run_ranks(2, hanging_after_a_stop, str(recipe))
    told = "".join((tmp_path / f"stderr{number}").read_text() for number in range(2))
    assert "failed: rank 1 has not moved for" in told
    assert (tmp_path / "run" / "hang-rank0.txt").is_file()
    train_ranks(2, recipe)
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 13))


class CountingStore:
    """A store that counts its calls."""

    def __init__(self, store: Any):
        self._store, self.calls = store, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.calls += 1
        return getattr(self._store, name)


def test_a_beat_costs_a_rank_three_calls_whatever_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch.distributed as dist

    from shardstep.trainer.distributed.store import HeartbeatStore

    shared = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: shared)
    worlds = [SimpleNamespace(process_index=rank, num_processes=40) for rank in range(40)]
    boards = [HeartbeatStore(world) for world in worlds]  # type: ignore[arg-type]
    assert boards[0].exchange("first") == {0: "first"}  # nobody else has come
    assert boards[7].exchange("seventh") == {0: "first", 7: "seventh"}
    assert boards[0].exchange("again") == {0: "again", 7: "seventh"}
    for board in boards:
        board.exchange(f"here {board.rank}")
    boards[0].exchange("here 0")
    for board in boards:
        board._store = CountingStore(board._store)  # type: ignore[assignment]
        seen = board.exchange(f"there {board.rank}")
        assert not board.verdict()
        assert seen[board.rank] == f"there {board.rank}"
        assert set(seen) == (set(range(40)) if board.rank == 0 else {0, board.rank})
        assert board._store.calls == 3  # type: ignore[union-attr]
    assert boards[9].read() == {rank: f"there {rank}" for rank in range(40)}


# --- numbers ----------------------------------------------------------------------------------------------------------


def bad_batches(recipe: str, steps: list[int], *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: on the last rank, some steps see images of NaN."""
    import dataclasses

    from shardstep.trainer import loop

    function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step + 1 in steps and run.accelerator.process_index == run.accelerator.num_processes - 1:
            spoilt = [dataclasses.replace(micro, images=micro.images * torch.nan) for micro in batch.micro_batches]
            batch = dataclasses.replace(batch, micro_batches=iter(spoilt))
        return function(run, batch)

    loop.train_step = step
    return failure_of(recipe, *overrides)


@pytest.mark.parametrize("world_size", [1, 2])
def test_single_bad_batches_are_left_out(shards: Path, tmp_path: Path, world_size: int) -> None:
    model = {"name": "whitening_cnn", "widths": [8, 8]}  # whose running statistics must not take them in
    recipe = write_recipe(tmp_path, shards, **SECTIONS | {"model": model})
    outcomes = run_ranks(world_size, bad_batches, str(recipe), [3, 8], "train.on_nan=skip")
    assert [code for code, _, _ in outcomes] == [0] * world_size
    lines = {line["step"]: line for line in train_lines(tmp_path / "run")}
    assert [step for step, line in lines.items() if line["loss"] is None] == [3, 8]
    assert lines[12]["skipped_steps"] == 2
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


def test_too_many_bad_batches_end_the_run(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    overrides = ("train.on_nan=skip", "train.max_skipped_steps=1")
    for code, _, _ in run_ranks(2, bad_batches, str(recipe), [3, 8], *overrides):
        assert code == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_bad_batch_ends_the_run_by_default_and_it_can_be_resumed(
    undisturbed: Callable[[int], Path], shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    outcomes = run_ranks(2, bad_batches, str(recipe), [8])
    assert [code for code, _, _ in outcomes] == [1, 1]
    assert "the loss is nan at step 8" in outcomes[0][2]
    train_ranks(2, recipe)
    assert_equal(tmp_path / "run", undisturbed(2))


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)


def on_a_disk_that_fills(recipe: str, folder: str) -> tuple[int, str, str]:
    """Runs in a rank: after step 5 something else takes the disk's last bytes, after step 9 it gives them back."""
    from shardstep.trainer import loop

    function, filler = loop.train_step, Path(folder) / "filler"

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step == 5:
            fill(filler)
        if run.state.progress.step == 9:
            filler.unlink()
        return function(run, batch)

    loop.train_step = step
    return failure_of(recipe, "checkpoint.every=2 steps", "eval.every=100 steps")


def test_a_full_disk_gives_a_warning_and_training_continues(shards: Path, tmp_path: Path, small_disk: Path) -> None:
    own: dict[str, Any] = {"run": {"dir": str(small_disk / "run")}, "model": {"name": "mlp", "hidden": [4]}}
    recipe = write_recipe(tmp_path, shards, **SECTIONS | own | {"optimizer": {"name": "sgd", "lr": 0.05}})
    ((code, _, message),) = run_ranks(1, on_a_disk_that_fills, str(recipe), str(small_disk), pictures=True)
    assert "warning: step 6 could not be saved, training continues: [Errno 28] No space left on device" in message
    assert [line["step"] for line in train_lines(small_disk / "run")] == list(range(1, 13))
    from shardstep.trainer.checkpoints import checkpoint_files

    found = checkpoint_files.list_checkpoints(small_disk / "run" / "checkpoints")
    assert checkpoint_files.step_of(found[-1]) == 12
    assert not any(checkpoint_files.problems_of(path) for path in found)
    assert code == 0
    assert "warning: not all pictures could be drawn" in message


def out_of_reach(recipe: str, how: str) -> tuple[int, str, str]:
    """Runs in a rank: from step 5 to step 9 the run's folder is gone, or its checkpoints cannot be written."""
    from shardstep.trainer import loop

    function, folder = loop.train_step, Path(recipe).parent / "run"
    checkpoints, elsewhere = str(folder / "checkpoints"), folder.with_name("elsewhere")

    def step(run: Any, batch: Any) -> Any:
        if run.state.progress.step in (5, 9):
            time.sleep(1)  # until what is being written is
        if run.state.progress.step == 5 and how == "read-only":
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)
        if run.state.progress.step == 9 and how == "read-only":
            subprocess.run(["umount", "-l", checkpoints], check=True)
        if run.state.progress.step == 5 and how == "gone":
            folder.rename(elsewhere)
        if run.state.progress.step == 9 and how == "gone":
            elsewhere.rename(folder)  # fails if a folder has been made in its place
        return function(run, batch)

    loop.train_step = step
    return failure_of(recipe, "checkpoint.every=2 steps", "eval.every=100 steps")


@pytest.mark.parametrize(
    ("how", "reason"), [("gone", "No such file or directory"), ("read-only", "Read-only file system")]
)
def test_a_folder_out_of_reach_gives_a_warning_and_training_continues(
    undisturbed: Callable[[int], Path], shards: Path, tmp_path: Path, small_disk: Path, how: str, reason: str
) -> None:
    """The fixture small_disk skips the test where nothing can be mounted."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    ((code, _, message),) = run_ranks(1, out_of_reach, str(recipe), how)
    assert code == 0, message
    for step in (6, 8):
        assert f"warning: step {step} could not be saved, training continues: " in message
    assert reason in message
    from shardstep.trainer.checkpoints import checkpoint_files

    found = checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint_files.step_of(found[-1]) == 12
    assert not any(checkpoint_files.problems_of(path) for path in found)
    weights = [load_file(run / "model.safetensors") for run in (tmp_path / "run", undisturbed(1))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_lines_that_cannot_be_written_come_with_the_next(tmp_path: Path) -> None:
    told: list[str] = []
    lines = LineFile(Path("/dev/full"), told.append)
    lines.append("one")
    lines.append("two")
    assert len(told) == 1
    assert "/dev/full cannot be written, so its lines stay in memory for now: No space left on device" in told[0]
    lines.close()
    lines._file = (tmp_path / "lines").open("ab", buffering=0)  # the disk has room again
    lines.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def train_in_a_thread(recipe: str) -> tuple[int, list[str], bool]:
    """Runs in a rank: exit code and warnings of a run called in a thread, and whether signal handlers are as before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    with ThreadPoolExecutor(1) as pool:
        code, _, errors = pool.submit(failure_of, recipe).result()
    warnings = [line for line in errors.splitlines() if line.startswith("warning")]
    return code, warnings, handlers == [signal.getsignal(number) for number in numbers]


def test_training_works_outside_the_main_thread(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "3 steps"})
    first, second = run_ranks(2, train_in_a_thread, str(recipe))
    text = "warning: called outside the main thread, where Python handles no signals: only the file"
    assert first == (0, [f"{text} {tmp_path / 'run' / 'STOP'} stops this run"], True)
    assert second == (0, [], True)
    assert RunDir(tmp_path / "run").state() == "finished"
