"""One run at a time in a folder, and how a restart treats run.resume=never."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.checkpoints import lock
from tests.distributed import HANG_S, context, free_port, join_world, run_ranks
from tests.runs import failure_of, train_lines, train_ranks, train_until, write_recipe

SECTIONS: dict[str, Any] = {"checkpoint": {"every": "2 steps"}, "train": {"duration": "8 steps"}}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def train_alone(recipe: str, results: Any, pause: str) -> None:
    """A process that trains, and waits for another before it claims its folder, or at step 3."""
    from shardstep.trainer import loop, resume

    folder = Path(recipe).parent

    def wait() -> None:
        (folder / f"waiting-{os.getpid()}").touch()
        wait_for(folder / "go")

    claim, function = resume.claim, loop.train_step

    def paused_claim(*arguments: Any) -> None:
        if pause == "claim":
            wait()
        claim(*arguments)

    def paused_step(run: Any, batch: Any) -> Any:
        if pause == "step" and run.state.progress.step == 3:
            wait_for(folder / "run" / "checkpoints" / "step-00000002")
            time.sleep(0.5)  # for what is done after it
            wait()
        return function(run, batch)

    resume.claim, loop.train_step = paused_claim, paused_step
    join_world(0, 1, free_port())
    results.put(failure_of(recipe))


def start_alone(recipe: Path, results: Any, pause: str) -> Any:
    process = context.Process(target=train_alone, args=(str(recipe), results, pause))
    process.start()
    return process


def content_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        if "waiting" not in path.name and path.name != lock.LOCK_NAME
    }


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(shards: Path, tmp_path: Path) -> None:
    recipe, results = write_recipe(tmp_path, shards, **SECTIONS), context.Queue()
    first = start_alone(recipe, results, "step")
    wait_for(tmp_path / f"waiting-{first.pid}")
    before = content_of(tmp_path)
    for overrides in ([], ["run.resume=never"], ["run.resume=must"]):
        for code, _, message in run_ranks(2, failure_of, str(recipe), *overrides):
            assert code == 2
            assert message == "" or (
                f"run.dir={tmp_path / 'run'} is in use by process {first.pid} on {os.uname().nodename} since 20"
                in message
                and message.count("\n") == 1
            )
        assert content_of(tmp_path) == before
    (tmp_path / "go").touch()
    assert results.get(timeout=HANG_S)[0] == 0
    first.join()
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 9))


def test_a_killed_run_leaves_its_folder_free(shards: Path, tmp_path: Path) -> None:
    recipe, results = write_recipe(tmp_path, shards, **SECTIONS), context.Queue()
    first = start_alone(recipe, results, "step")
    wait_for(tmp_path / f"waiting-{first.pid}")
    first.kill()
    first.join()
    train_ranks(2, recipe)
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 9))


def test_of_two_that_begin_at_once_one_trains(shards: Path, tmp_path: Path) -> None:
    recipe, results = write_recipe(tmp_path, shards, **SECTIONS), context.Queue()
    processes = [start_alone(recipe, results, "claim") for _ in range(2)]
    for process in processes:
        wait_for(tmp_path / f"waiting-{process.pid}")
    (tmp_path / "go").touch()
    outcomes = sorted(results.get(timeout=HANG_S) for _ in processes)
    assert [code for code, _, _ in outcomes] == [0, 2]
    assert "is in use by" in outcomes[1][2] or "another run started" in outcomes[1][2]
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, 9))
    assert not list(tmp_path.glob("run.old*"))


def test_a_run_that_has_come_and_gone_meanwhile_is_not_put_aside(shards: Path, tmp_path: Path) -> None:
    recipe, results = write_recipe(tmp_path, shards, **SECTIONS), context.Queue()
    late = start_alone(recipe, results, "claim")
    wait_for(tmp_path / f"waiting-{late.pid}")
    train_ranks(1, recipe)
    before = content_of(tmp_path / "run")
    (tmp_path / "go").touch()
    code, _, message = results.get(timeout=HANG_S)
    assert code == 2
    assert f"another run started in {tmp_path / 'run'} while this one was starting" in message
    assert content_of(tmp_path / "run") == before
    assert not list(tmp_path.glob("run.old*"))


def test_a_process_may_come_back_to_its_folder(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert lock.hold(tmp_path, warnings.append)
    assert not lock.hold(tmp_path, warnings.append)
    assert not warnings


def test_patience_waits_for_the_holder_to_end(tmp_path: Path) -> None:
    other = (tmp_path / lock.LOCK_NAME).open("w")
    fcntl.flock(other, fcntl.LOCK_EX)  # another description of the file, as another process has
    with pytest.raises(InputError, match="is in use by another process"):
        lock.hold(tmp_path, print)
    threading.Timer(1.0, other.close).start()
    assert lock.hold(tmp_path, print, patience_s=20)


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    warnings: list[str] = []
    assert lock.hold(tmp_path, warnings.append)
    assert not lock.hold(tmp_path, warnings.append)
    assert len(warnings) == 1
    assert "cannot be locked (No locks available)" in warnings[0]


# --- restarts ---------------------------------------------------------------------------------------------------------


def attempt(recipe: str, environment: dict[str, str]) -> tuple[int, str, str]:
    """Runs in a rank: start as a launcher does, for the first time or again."""
    os.environ.update(environment)
    return failure_of(recipe, "run.resume=never")


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_does_not_begin_again(shards: Path, tmp_path: Path, name: str) -> None:
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    train_ranks(1, recipe)  # an older run, which the first attempt puts aside
    run_ranks(2, train_until, str(recipe), 5, "run.resume=never")
    assert (tmp_path / "run.old1").is_dir()
    outcomes = run_ranks(2, attempt, str(recipe), {name: "1"})
    assert [code for code, _, _ in outcomes] == [0, 0]
    assert "run.resume=never holds for the first attempt" in outcomes[0][1]
    assert "step-00000004" in outcomes[0][1]
    assert not (tmp_path / "run.old2").exists()
    assert run_ranks(1, attempt, str(recipe), {name: "0"})[0][0] == 0
    assert (tmp_path / "run.old2").is_dir()


def test_a_glance_at_the_lock_refuses_no_run(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK_NAME).touch()
    assert not lock.is_held(tmp_path)
    glance = (tmp_path / lock.LOCK_NAME).open()
    fcntl.flock(glance, fcntl.LOCK_SH)  # as is_held() does, for a little longer
    threading.Timer(0.01, glance.close).start()
    assert lock.hold(tmp_path, warn=pytest.fail)
    assert lock.is_held(tmp_path)
