"""Any launcher's variables become torchrun's; what cannot become one world is refused in one line."""

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.distributed.launch_env import check_own_launch, is_restarted, launch_variables
from shardstep.trainer.distributed.launchers import LAUNCHERS, PLACE, adopt_launch
from tests.distributed import BOTH_MPIS, HANG_S, free_port, mpi, run_ranks
from tests.launch.test_launch import BIN, TRAIN
from tests.runs import failure_of, read_lines, train_ranks, write_recipe

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
SUBMITIT = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
SRUN = {
    "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x1),2,1", "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}  # fmt: skip
PLACED = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ONE_OF_ONE = PLACED | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
LEFT_OVER = "If that is left over from another program: unset"
TORCHRUN = PLACED | {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def adopted(environment: dict[str, str]) -> dict[str, str]:
    """What a process started with these variables has afterwards."""
    environment = dict(environment)
    adopt_launch(environment)
    return environment


def check(environment: dict[str, str], wanted: int | None = None) -> None:
    """Check a launch in a process with these variables."""
    with mock.patch.dict(os.environ, environment, clear=True):
        adopt_launch()
        check_own_launch(wanted)


def place_of(environment: dict[str, str]) -> list[str]:
    return [adopted(environment).get(name, "-") for name in PLACE]


@pytest.mark.parametrize(
    "launch", [OPEN_MPI, MPICH, MVAPICH, SUBMITIT], ids=["open mpi", "mpich", "mvapich", "submitit"]
)
def test_ranks_of_one_machine(launch: dict[str, str]) -> None:
    found = adopted(launch)
    assert [found[name] for name in PLACE] == ["1", "1", "2", "2"]
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(found["MASTER_PORT"]) < 32_000
    assert adopted(found) == found  # a second time changes nothing
    assert adopted(launch)["MASTER_PORT"] == found["MASTER_PORT"]  # another rank of this launcher computes the same
    check(launch, 2)
    assert launch.items() <= launch_variables(found).items()  # what the doctor shows


def test_ranks_of_srun_on_several_nodes() -> None:
    found = adopted(SRUN)
    assert [found[name] for name in PLACE] == ["4", "1", "6", "2"]  # its node, the second, has two tasks
    assert found["MASTER_ADDR"] == "gpu07"
    other_step = adopted(SRUN | {"SLURM_STEP_ID": "1"})
    assert found["MASTER_PORT"] != other_step["MASTER_PORT"]
    check(SRUN, 6)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3,5-9],m1", "n3"), ("r[1-2]n[01-04]", "r1n01"), ("n[1-2].x,b", "n1.x")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert adopted(SRUN | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_what_is_set_is_kept() -> None:
    found = adopted(OPEN_MPI | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["RANK"]) == ("node1", "29500", "1")
    assert adopted(TORCHRUN) == TORCHRUN
    assert adopted(TORCHRUN | SRUN) == TORCHRUN | SRUN  # torchrun, once on each node


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ["-", "-", "-", "-"]),
        ({name: "1" if name.endswith("SIZE") else "0" for name in OPEN_MPI}, ["-", "-", "-", "-"]),  # mpirun -n 1
        # One task of srun is no launch: a shell in it may start ranks itself.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ["-", "-", "-", "-"]),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"} | MPICH, ["1", "1", "2", "2"]),
        # mpirun's daemons on three nodes, started by srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "3"} | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "6"}, ["1", "1", "6", "2"]),
        # srun --mpi=pmi2
        (SRUN | {"PMI_RANK": "4", "PMI_SIZE": "6"}, ["4", "1", "6", "2"]),
        # By hand: all ranks on this machine, or one rank on each.
        (BY_HAND, ["1", "1", "2", "2"]),
        (BY_HAND | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "LOCAL_RANK": "3"}, ["3", "3", "4", "4"]),
        (BY_HAND | {"MASTER_ADDR": "job-master-0", "PET_NNODES": "2"}, ["1", "0", "2", "1"]),
        # What is wrong or incomplete is left as it was given.
        (without(BY_HAND, "MASTER_ADDR"), ["1", "-", "2", "-"]),
        (without(BY_HAND, "MASTER_PORT"), ["1", "-", "2", "-"]),
        (BY_HAND | {"RANK": "2"}, ["2", "-", "2", "-"]),
        (BY_HAND | {"RANK": ""}, ["", "-", "2", "-"]),
        # Job scripts that set only what torch needs.
        (SRUN | {"RANK": "4", "WORLD_SIZE": "6", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["4", "1", "6", "2"]),
    ],
)  # fmt: skip
def test_places(environment: dict[str, str], place: list[str]) -> None:
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        # left over, or incomplete
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set. If that is left over from another program: unset"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1, but RANK is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but RANK is not set"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, but RANK is not set"),
        ({"RANK": "0"}, f"RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT. {LEFT_OVER} RANK. Or"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, f"RANK is set, but not MASTER_ADDR, MASTER_PORT. {LEFT_OVER} RANK WORLD_SIZE. Or"),
        (BY_HAND | {"RANK": "5"}, f"RANK=5, but WORLD_SIZE=2: ranks count from 0. {LEFT_OVER} RANK WORLD_SIZE. Or"),
        ({"RANK": "", "MASTER_ADDR": "a"}, f"RANK=(empty): not a whole number. {LEFT_OVER} RANK. Or"),
        (BY_HAND | {"RANK": ""}, "RANK=(empty): not a whole number"),
        ({"WORLD_SIZE": ""}, f"WORLD_SIZE=(empty): not a whole number. {LEFT_OVER} WORLD_SIZE. Or"),
        (PLACED | {"LOCAL_RANK": ""}, "LOCAL_RANK=(empty): not a whole number"),
        (PLACED | {"LOCAL_WORLD_SIZE": " 2"}, "LOCAL_WORLD_SIZE= 2: not a whole number"),
        ({"SLURM_NTASKS": ""}, f"SLURM_NTASKS=(empty): not a whole number. {LEFT_OVER} SLURM_NTASKS. Or"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: not a whole number"),
        ({"SLURM_CPUS_PER_TASK": "x", "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x, SLURM_CPUS_PER_TASK=x: not"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "x"}, "GROUP_WORLD_SIZE=x: not a whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE=x: not a whole number"),
        (without(PLACED, "MASTER_ADDR"), "RANK is set, but not MASTER_ADDR"),
        (without(PLACED, "MASTER_PORT"), "RANK is set, but not MASTER_PORT"),
        (PLACED | {"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR"),
        (without(PLACED, "WORLD_SIZE"), "RANK is set, but not WORLD_SIZE"),
        (without(PLACED, "LOCAL_WORLD_SIZE"), "RANK is set, but not LOCAL_WORLD_SIZE"),
        # no place in a world
        (PLACED | {"RANK": "2"}, "RANK=2, but WORLD_SIZE=2: ranks count from 0"),
        (PLACED | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2"),
        (PLACED | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: more ranks on this machine than in the world"),
        (PLACED | {"RANK": "-1"}, "RANK=-1: not a whole number"),
        (PLACED | {"RANK": "one", "WORLD_SIZE": "two"}, "RANK=one, WORLD_SIZE=two: not a whole number"),
        (PLACED | {"MASTER_PORT": "http"}, "MASTER_PORT=http is not a port: 1 to 65535. Set it to that of rank 0's machine"),
        (BY_HAND | {"MASTER_PORT": "http"}, "MASTER_PORT=http is not a port"),
        (BY_HAND | {"MASTER_ADDR": "node1:29500"}, "MASTER_ADDR=node1:29500 is not the name or address of a machine. Set"),
        (BY_HAND | {"MASTER_ADDR": "tcp://node1"}, "MASTER_ADDR=tcp://node1 is not the name"),
        (BY_HAND | {"MASTER_ADDR": "node-[1-4]"}, "MASTER_ADDR=node-[1-4] is not the name"),
        (BY_HAND | {"MASTER_ADDR": "abc:29500"}, "MASTER_ADDR=abc:29500 is not the name"),
        (BY_HAND | {"MASTER_ADDR": "node 1"}, "MASTER_ADDR=node 1 is not the name"),
        (PLACED | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        (PLACED | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        # launchers that start processes, and others that should have
        (MPICH | {"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}, "mpiexec does not say where its ranks meet. Set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun does not say where its ranks meet"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_SIZE=2, but the other variables of mpiexec"),
        ({"SLURM_NTASKS": "4"}, "Slurm was asked for 4 tasks"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2 asks for several ranks, but only torchrun reads it"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES=1:4"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, "PET_NPROC_PER_NODE=2"),
        ({"PET_NPROC_PER_NODE": "10"}, "PET_NPROC_PER_NODE=10"),
        ({"PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto asks for several ranks, but only torchrun reads it"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "gpu"}, "PET_NPROC_PER_NODE=gpu"),
        ({"PET_NPROC_PER_NODE": "cpu"}, "PET_NPROC_PER_NODE=cpu"),
        # Accelerate
        *(
            (launch | {f"ACCELERATE_USE_{what}": value}, f"with which shardstep trains: ACCELERATE_USE_{what}={value}.")
            for what in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER", "TP", "ANYTHING_NEW")
            for value, launch in (("true", {}), ("True", TORCHRUN), ("1", PLACED))
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR. Leave it out"),
        # contradictions
        (OPEN_MPI | {"WORLD_SIZE": "4"}, "mpirun started this process as rank 1 of 2: unset WORLD_SIZE before it"),
        (OPEN_MPI | {"LOCAL_RANK": "1"}, "unset LOCAL_RANK before it"),  # right by chance, on this rank
        (MPICH | {"RANK": "1"}, "mpiexec started this process as rank 1 of 2: unset RANK before it"),
        (OPEN_MPI | TORCHRUN, "mpirun started 2 tasks, but the launcher in this one brings up a separate world of 2"),
        (MPICH | TORCHRUN, "mpiexec started 2 tasks, but the launcher in this one brings up a separate world of 2"),
        (MPICH | ONE_OF_ONE, "mpiexec started 2 tasks, but the launcher in this one brings up a separate world of 1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, "srun started 2 tasks, but the launcher in this one"),
        (SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks, but the launcher in this one"),
    ],
)  # fmt: skip
def test_refusals(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(InputError, match=".") as raised:
        check(environment)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},  # a job script's, for another command
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"},
        {"PET_NNODES": "1:1", "PET_NPROC_PER_NODE": ""},
        PLACED | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"},  # a pod of Kubeflow's PyTorchJob
        *(
            {**BY_HAND, "MASTER_ADDR": name}
            for name in ("::1", "fe80::1%eth0", "10.0.0.1", "n1.cluster.local.", "a_b-0")
        ),
        {"MASTER_PORT": "http"},  # of no world
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "", "ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        PLACED,
        TORCHRUN,
        TORCHRUN | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"},
        TORCHRUN | {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"},
        OPEN_MPI | TORCHRUN | {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4"},  # mpirun started torchrun on each machine
    ],
)
def test_launches_that_are_right(environment: dict[str, str]) -> None:
    check(environment)


def test_no_two_launchers_share_a_name_and_all_places_are_complete() -> None:
    assert len({launcher.name for launcher in LAUNCHERS}) == len(LAUNCHERS)
    for launcher in LAUNCHERS:
        assert launcher.place(dict.fromkeys(launcher.names(), "2") | {"SLURM_NODEID": "0"}), launcher.name
        for lacking in launcher.names():
            assert not launcher.place({name: "2" for name in launcher.names() if name != lacking})


# --- real launchers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "error: WORLD_SIZE=2, but RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "error: RANK=x: not a whole number"),
        ({"RANK": "x", "WORLD_SIZE": "y", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}, "error: RANK=x, WORLD_SIZE=y"),
        ({"RANK": ""}, "error: RANK=(empty): not a whole number"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "error: Accelerate was set up for more than plain DDP"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "error: RANK is set, but not MASTER_ADDR"),  # rank 1 says so itself
        ({"PET_NNODES": "2"}, "error: PET_NNODES=2"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_and_writes_nothing(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    result = run([str(BIN / "shardstep"), "train", "smoke"], tmp_path, environment)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = os.environ | (environment or {})
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_count_of_restarts_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, restarted in (("x", False), ("", False), ("0", False), ("-1", False), ("2", True)):
        monkeypatch.setenv(name, text)
        assert is_restarted() == restarted, text


def test_a_rank_that_is_none_is_refused_aloud(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, run={"dir": str(tmp_path / "run")}))
    ((code, _, stderr),) = run_ranks(1, train_as, OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, recipe)
    assert code == 2
    assert stderr.startswith("error: ")


def train_as(variables: dict[str, str], recipe: str, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: exit code, stdout and stderr of a command with these variables."""
    os.environ.update(variables)
    return failure_of(recipe, *overrides)


def test_ranks_that_cannot_meet(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, run={"dir": str(tmp_path / "run"), "hang_timeout": None}))
    first_of_two = PLACED | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        ((code, _, stderr),) = run_ranks(1, train_as, first_of_two | {"MASTER_PORT": taken}, recipe)
    assert code == 2
    assert stderr == f"error: port {taken} of this machine is taken by another program: set MASTER_PORT to a free one\n"

    free = str(free_port())  # where the second rank never comes
    ((code, _, stderr),) = run_ranks(1, train_as, first_of_two | {"MASTER_PORT": free}, recipe, "train.timeout_s=1")
    assert code == 1
    assert stderr.startswith(f"failed: rank 0 did not meet the others at 127.0.0.1:{free}: Timed out after")
    assert stderr.count("\n") == 1


@pytest.fixture(scope="module")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run on two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    train_ranks(2, write_recipe(folder, shards))
    return losses(folder)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_waits_for_the_others_can_be_stopped(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    place = PLACED | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [str(BIN / "shardstep"), "train", str(recipe)]
    with subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(6)  # in the middle of its imports, or waiting: rank 0 never comes
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 85
    assert f"stopped by {number.name}, while waiting for the other ranks\n" in stderr


@BOTH_MPIS
def test_mpirun_trains_one_world(name: str, two_ranks: list[float], shards: Path, tmp_path: Path) -> None:
    command = [*mpi(name), "-n", "2", str(BIN / "shardstep"), "train", str(write_recipe(tmp_path, shards))]
    # A shell between the launcher and the rank, as in many job scripts.
    result = run([*command[:-3], "sh", "-c", '"$@"; exit $?', "sh", *command[-3:]], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 ranks, cpu" in result.stdout
    assert result.stdout.count("done:") == 1
    assert "\x1b" not in result.stdout  # Open MPI gives ranks a pseudo-terminal, though its output is a pipe
    assert losses(tmp_path) == pytest.approx(two_ranks, rel=1e-5)


@BOTH_MPIS
def test_what_mpirun_cannot_start_is_refused(name: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train, two = [str(BIN / "shardstep"), "train", str(recipe)], [*mpi(name), "-n", "2"]
    cases = [
        ([*two, *train, "--nproc", "2"], {}, "error: --nproc starts ranks itself", 1),
        ([*two, *train], {"LOCAL_RANK": "0"}, "unset LOCAL_RANK before it", 1),
        ([*two, *train, "train.world_size=3"], {}, "train.world_size=3, but 2 ranks came up", 1),
    ]
    for command, environment, message, times in cases:
        result = run(command, tmp_path, environment)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count(message) == times, result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@BOTH_MPIS
@pytest.mark.drill
def test_torchrun_inside_of_mpirun(name: str, shards: Path, tmp_path: Path) -> None:
    """Each torchrun on its own would be a separate world; one that knows of the other is not."""
    recipe = write_recipe(tmp_path, shards)
    torchrun = [*mpi(name), "-n", "2", str(BIN / "torchrun"), "--nproc-per-node", "1"]
    result = run([*torchrun, TRAIN, str(recipe)], tmp_path)
    assert result.returncode != 0
    assert "started 2 tasks, but the launcher in this one brings up a separate world of 1" in result.stderr
    assert not (tmp_path / "run").exists()
    meeting = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "pair",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
    ]
    result = run([*torchrun, *meeting, TRAIN, str(recipe)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 ranks, cpu" in result.stdout


@pytest.mark.drill
def test_ranks_end_with_mpirun(shards: Path, tmp_path: Path) -> None:
    """mpirun is killed: nobody else would end the ranks, which save and leave."""
    endless = {"train": {"duration": "1000000 steps"}, "log": {"every": "20 steps"}, "eval": {"every": "100000 steps"}}
    recipe = write_recipe(tmp_path, shards, **endless)
    command = [*mpi("mpich"), "-n", "2", str(BIN / "shardstep"), "train", str(recipe)]
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANG_S
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    proxy = int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()[0])
    os.kill(proxy, signal.SIGKILL)
    launcher.wait(HANG_S)
    while not (tmp_path / "run" / "summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert '"status": "preempted"' in (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.drill
@pytest.mark.parametrize("exports", [False, True], ids=["bare", "exported"])
def test_submitit_trains_one_world(exports: bool, shards: Path, tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed (pip install submitit)")
    executor = submitit.AutoExecutor(folder=str(tmp_path / "logs"), cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=10)
    job = executor.submit(train_by_submitit, str(write_recipe(tmp_path, shards)), exports)
    assert job.results() == [0, 0]
    assert '"world_size": 2' in (tmp_path / "run" / "summary.json").read_text()


def train_by_submitit(recipe: str, exports: bool) -> int:
    """Runs in a task, with torch's variables or without."""
    import submitit

    from shardstep.launch.train import main

    if exports:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return main([recipe])


@pytest.mark.drill
def test_torchrun_reads_kubeflows_variables(two_ranks: list[float], shards: Path, tmp_path: Path) -> None:
    """Each pod runs torchrun without options."""
    recipe = write_recipe(tmp_path, shards)
    pods = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(
            lambda node: run([str(BIN / "torchrun"), TRAIN, str(recipe)], tmp_path, pods | {"PET_NODE_RANK": node}),
            "01",
        )
    for result in results:
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(two_ranks, rel=1e-5)


@pytest.mark.drill
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_ray_trains_one_world(two_ranks: list[float], shards: Path, tmp_path: Path) -> None:
    """Ray's workers call a function in a thread of theirs, in a process group that Ray has brought up."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[train]')")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    recipe = str(write_recipe(tmp_path, shards))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        TorchTrainer(
            train_by_ray,
            train_loop_config={"recipe": recipe, "codes": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        ).fit()
    finally:
        ray.shutdown()
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert losses(tmp_path) == pytest.approx(two_ranks, rel=1e-5)


def train_by_ray(options: dict[str, str]) -> None:
    """Runs in a worker."""
    from shardstep.launch.train import main

    code = main([options["recipe"]])
    Path(options["codes"], f"code{os.environ['RANK']}").write_text(str(code))
