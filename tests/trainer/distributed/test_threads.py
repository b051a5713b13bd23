"""The threads of a rank: its share of the cores, or fewer if a person asks for fewer, under every launcher."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from shardstep.trainer.distributed.launch_env import Threads, explained_threads, threads_per_rank
from tests.distributed import BOTH_MPIS, HANG_S, mpi, run_ranks
from tests.runs import write_recipe

NODE = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "3"}
AGENT = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "asked", "threads"),
    [
        ({}, None, 8),
        ({}, 3, 3),
        ({}, 8, 8),
        ({}, 9, 8),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "99"}, None, 8),
        ({"OMP_NUM_THREADS": " 3,2"}, None, 3),  # 3, and 2 of each in a nested loop
        ({"OMP_NUM_THREADS": "3"}, 4, 4),  # the recipe's key is the later word
        ({"OMP_NUM_THREADS": ""}, None, 8),
        ({"OMP_NUM_THREADS": "0"}, None, 8),  # libgomp says that it is invalid
        ({"OMP_NUM_THREADS": "many"}, None, 8),
        (NODE, None, 4),
        (NODE, 1, 1),
        (NODE | {"OMP_NUM_THREADS": "3"}, None, 3),
        ({"LOCAL_WORLD_SIZE": "8"}, None, 1),
        ({"LOCAL_WORLD_SIZE": "32"}, None, 1),
        (SLURM, None, 3),  # a task is a rank
        (SLURM, 2, 2),
        (SLURM | {"OMP_NUM_THREADS": "1"}, None, 1),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "6"}, None, 3),  # a task is a node
        (SLURM | {"SLURM_CPUS_PER_TASK": "99"}, None, 8),
        (AGENT | {"OMP_NUM_THREADS": "1"}, None, 4),  # the agent's
        (AGENT | {"OMP_NUM_THREADS": "1"}, 2, 2),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, None, 8),
    ],
)
def test_threads(
    environment: Mapping[str, str], asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("shardstep.configs.cores.parent_environment", dict)
    assert threads_per_rank(environment, asked) == threads


@pytest.mark.parametrize(
    ("environment", "asked", "threads"),
    [
        ({}, None, Threads(8, "")),
        ({}, 9, Threads(8, "")),
        ({}, 2, Threads(2, "train.threads=2")),
        ({"OMP_NUM_THREADS": "1"}, None, Threads(1, "OMP_NUM_THREADS=1")),
        ({"OMP_NUM_THREADS": "99"}, None, Threads(8, "")),
        ({"OMP_NUM_THREADS": "1"}, 2, Threads(2, "train.threads=2 counts, not OMP_NUM_THREADS=1")),
        ({"OMP_NUM_THREADS": "4"}, 2, Threads(2, "train.threads=2 counts, not OMP_NUM_THREADS=4")),
        ({"OMP_NUM_THREADS": "1"}, 8, Threads(8, "train.threads=8 counts, not OMP_NUM_THREADS=1")),
        ({"OMP_NUM_THREADS": "2"}, 2, Threads(2, "train.threads=2")),
        (NODE, None, Threads(4, "8 cores for 2 ranks")),
        (NODE, 6, Threads(4, "8 cores for 2 ranks")),
        (NODE | {"OMP_NUM_THREADS": "3"}, None, Threads(3, "OMP_NUM_THREADS=3")),
        ({"LOCAL_WORLD_SIZE": "32"}, None, Threads(1, "8 cores for 32 ranks")),
        (SLURM, None, Threads(3, "3 cores for 1 rank")),
        (
            AGENT | {"OMP_NUM_THREADS": "1"},
            None,
            Threads(4, "8 cores for 2 ranks"),
        ),  # the agent's, which nobody asked for
    ],
)
def test_what_limits_the_threads(
    environment: Mapping[str, str], asked: int | None, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("shardstep.configs.cores.parent_environment", dict)
    assert explained_threads(environment, asked) == threads


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
@pytest.mark.parametrize(("given", "threads"), [(None, "4"), ("3", "3")], ids=["unset", "3"])
def test_launchers_hide_what_a_person_asks_for(
    launcher: list[str], given: str | None, threads: str, tmp_path: Path
) -> None:
    script = tmp_path / "print_threads.py"
    script.write_text(
        "import os\nos.sched_getaffinity = lambda process: set(range(8))\n"
        "from shardstep.trainer.distributed.launch_env import threads_per_rank\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').write(str(threads_per_rank(os.environ)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    subprocess.run([*launcher, str(script)], env=environment, check=True, capture_output=True, timeout=HANG_S)
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [threads, threads]


@BOTH_MPIS
@pytest.mark.parametrize(
    ("bound", "threads"),
    [(32, "16"), (16, "16"), (4, "4"), (1, "1")],
    ids=["unbound", "half each", "slot:PE=4", "one core each"],
)
def test_ranks_bound_by_mpirun_have_their_own_cores(name: str, bound: int, threads: str, tmp_path: Path) -> None:
    script = tmp_path / "print_threads.py"
    script.write_text(
        f"import os\nos.sched_getaffinity = lambda process: set(range(32 if process else {bound}))\n"
        "from shardstep.trainer.distributed import launchers, launch_env\n"
        "launchers.adopt_launch()\n"
        f"folder = {str(tmp_path)!r}\n"
        "open(os.path.join(folder, os.environ['RANK']), 'w').write(str(launch_env.threads_per_rank(os.environ)))\n"
    )
    subprocess.run(
        [*mpi(name), "-n", "2", sys.executable, str(script)], check=True, capture_output=True, timeout=HANG_S
    )
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [threads, threads]


def threads_of_a_run(recipe: str, *overrides: str) -> tuple[int, int, str | None]:
    """Runs in a rank: the threads of the main thread, of another one, and OMP_NUM_THREADS once the world is up."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from shardstep.configs.load import load_recipe
    from shardstep.trainer.distributed.world import start_world

    os.sched_getaffinity = lambda process: set(range(8))
    del os.environ["OMP_NUM_THREADS"]
    start_world(load_recipe(recipe, list(overrides)).recipe.train)
    with ThreadPoolExecutor(1) as pool:
        return torch.get_num_threads(), pool.submit(torch.get_num_threads).result(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize(("overrides", "threads"), [((), 4), (("train.threads=3",), 3), (("train.threads=64",), 4)])
def test_torch_uses_these_threads(overrides: tuple[str, ...], threads: int, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    # What Accelerate is given must not look like a person's wish to what starts later.
    assert run_ranks(2, threads_of_a_run, str(recipe), *overrides) == [(threads, threads, None)] * 2
