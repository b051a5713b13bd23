"""The launcher's environment variables: rank, size of the world, end of the allocation. No torch here.

torchrun, accelerate launch, the job scripts and `shardstep train --nproc` all set the same variables, and launchers.py
translates those of mpirun and srun. Only this module, launchers.py, world.py and store.py read them.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardstep.configs import cores
from shardstep.configs.cores import asked_threads, parent_environment, usable_cores
from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.trainer.distributed.launchers import (
    LAUNCHERS,
    MEETING_POINT,
    PLACE,
    SRUN,
    launcher_of,
    process_of,
)

_OWN = "SHARDSTEP_NPROC"  # set by `shardstep train --nproc`
_CALLER = "SHARDSTEP_CALLER"  # set by shardstep.train for the process that it starts: its own process id
_NUMBERS = (  # of the launchers' variables; Slurm's list of tasks on each node is none
    *dict.fromkeys(
        (*PLACE, *(name for launcher in LAUNCHERS for name in launcher.names() if name != SRUN.local_world_size))
    ),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_CPUS_PER_TASK"),
)
_ACCELERATE_USES = re.compile("ACCELERATE_USE_(?!CPU$).+")  # DEEPSPEED, FSDP, MEGATRON_LM, PARALLELISM_CONFIG, ...
_TRUE = ("true", "1", "yes", "y", "t", "on")


def rank() -> int:
    """Return this process's rank; 0 without a launcher, and for a rank that is no number, which is refused."""
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else 0


def world_size() -> int | None:
    """Return how many ranks the launcher starts; None without a launcher."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if is_launched() and size.isdecimal() else None


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which prints for all."""
    launcher = None if is_launched() else launcher_of(os.environ)  # whose ranks were refused a place
    rank_given = os.environ.get(launcher.rank if launcher else "RANK", "0")
    return rank_given == "0" or not rank_given.isdecimal()  # what is no rank is refused, aloud


def is_first_rank_of_node() -> bool:
    """Return whether this process is the first on its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_launched() -> bool:
    """Return whether a launcher has given this process a rank."""
    return "RANK" in os.environ


def meeting_point(environment: Mapping[str, str]) -> str:
    """Return where the ranks meet, as text."""
    return ":".join(environment[name] for name in MEETING_POINT)


def has_agent() -> bool:
    """Return whether this process has a launcher that reports every exit code except 0 as a failure."""
    return cores.has_agent(os.environ)


def ends_with_parent() -> bool:
    """Return whether this process must end with its parent: a launcher without which nobody would end the ranks."""
    ours = _OWN in os.environ or is_called()
    return ours or "TORCHELASTIC_RUN_ID" in os.environ or launcher_of(os.environ) is not None


def is_called() -> bool:
    """Return whether a Python program called shardstep.train, which shows what this process prints."""
    return _CALLER in os.environ


def parent() -> int:
    """Return the id of the process that started this one, even if it has ended, as far as that is known."""
    if is_called() and _OWN not in os.environ:
        return int(os.environ[_CALLER])
    return os.getppid()


def is_restarted() -> bool:
    """Return whether this process replaces one that ended: restarted by torchrun, or in a requeued job."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(text.isdecimal() and int(text) for text in counts)


def cpu_is_forced() -> bool:
    """Return whether `--cpu` or Accelerate's config file restricts Accelerate to the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE


def ignored_precision() -> str | None:
    """Return the precision given to `accelerate launch`, which has no effect, or None: the recipe decides."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if given == "no" else given


def environment_of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher on one machine sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _OWN: "1",
    }


def environment_of_call() -> dict[str, str]:
    """Return the variables by which a process knows that it was started for a call of shardstep.train."""
    return {_CALLER: str(os.getpid())}


def place_problem(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what is wrong with this process's place in its world, and the remedy; None if nothing is, or it has no place."""
    odd = [name for name in _NUMBERS if name in environment and not environment[name].isdecimal()]
    if odd:
        values = ", ".join(f"{name}={environment[name] or '(empty)'}" for name in odd)
        return f"{values}: not a whole number", _remedy_of_place(environment, odd)
    given = [name for name in PLACE if name in environment]
    what = _wrong_place(environment, [f"{name}={environment[name]}" for name in given]) if given else None
    if what:
        return what, _remedy_of_place(environment, given)
    what = _wrong_meeting_point(environment) if given else None
    return (what, "Set it to that of rank 0's machine: a name or an address, and a free port there") if what else None


def _wrong_place(environment: Mapping[str, str], given: Sequence[str]) -> str | None:
    if "RANK" not in environment:
        return f"{', '.join(given)}, but RANK is not set"
    missing = [name for name in ("WORLD_SIZE", *MEETING_POINT) if not environment.get(name)]
    if missing:
        return f"RANK is set, but not {', '.join(missing)}"
    for one, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if one in environment and limit in environment and int(environment[one]) >= int(environment[limit]):
            return f"{one}={environment[one]}, but {limit}={environment[limit]}: ranks count from 0"
    missing = [name for name in PLACE if name not in environment]  # which adopt_launch could not derive
    if missing:
        return f"RANK is set, but not {', '.join(missing)}"
    if int(environment["LOCAL_WORLD_SIZE"]) > int(environment["WORLD_SIZE"]):
        return f"{', '.join(given[2:])}: more ranks on this machine than in the world"
    return None


def _wrong_meeting_point(environment: Mapping[str, str]) -> str | None:
    address, port = (environment[name] for name in MEETING_POINT)
    if not re.fullmatch(r"[\w.-]+|[\da-fA-F:.]*:[\da-fA-F:.]*:[\da-fA-F:.]*(%\w+)?", address):  # a name, IPv4, or IPv6
        return f"MASTER_ADDR={address} is not the name or address of a machine"
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return f"MASTER_PORT={port} is not a port: 1 to 65535"
    return None


def check_own_launch(wanted: int | None) -> None:
    """Check this process's place in its world, then that world, of which `wanted` is the size, if not None.

    Raises:
        InputError: as `check_launch`, or the variables of the place are incomplete, contradictory or no numbers.
    """
    problem = place_problem(os.environ)
    if problem:
        raise _refusal(". ".join(problem), os.environ)
    check_launch(os.environ, wanted)


def check_launch(environment: Mapping[str, str], wanted: int | None) -> None:
    """Compare the world that the environment describes with the requested one; its place has passed `place_problem`.

    Raises:
        InputError: several separate worlds would come up, or a world of the wrong size, or Accelerate is to do more than DDP.
    """
    _check_accelerate(environment)
    problem = _separate_worlds(environment) if "RANK" in environment else _should_be_launched(environment)
    if problem:
        raise _refusal(problem, environment)
    world_size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
    if wanted is not None and world_size != wanted:
        raise InputError(
            f"train.world_size={wanted}, but {count(world_size, 'rank')} came up: start {wanted} "
            f"(torchrun --nproc-per-node {wanted} ...), or change train.world_size"
        )


def check_started_once(command: str, on_ranks: Sequence[str]) -> None:
    """Check that no launcher has started this process several times, for a command that is not among those on ranks.

    Raises:
        InputError: one has.
    """
    sizes = {launcher.world_size: launcher.tasks(os.environ) for launcher in LAUNCHERS}
    sizes["WORLD_SIZE"] = world_size() or 1
    variable, processes = max(sizes.items(), key=lambda entry: entry[1])
    if processes > 1:
        error = InputError(
            f"{command} does not run on ranks, and a launcher started {processes} processes ({variable}={processes}), each "
            f"of which would do the same. Start it without a launcher, which is for {', '.join(on_ranks)}; if {variable} is "
            f"left over from another program, unset it"
        )
        error.everywhere = ends_with_parent()
        raise error


def _refusal(problem: str, environment: Mapping[str, str]) -> InputError:
    """Return an error that all ranks of a launcher raise alike; what somebody has set may be in this process alone."""
    error, launcher = InputError(problem), launcher_of(environment)
    error.everywhere = launcher is not None and environment.get("RANK") in (None, environment[launcher.rank])
    return error


def _check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse what Accelerate would do beside plain DDP; with one rank it may do nothing of it, silently."""
    asked = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if (_ACCELERATE_USES.fullmatch(name) and value.lower() in _TRUE)
        or (name == "ACCELERATE_DYNAMO_BACKEND" and value.lower() not in ("", "no"))
    ]
    if asked:
        error = InputError(
            f"Accelerate was set up for more than plain DDP, with which shardstep trains: {', '.join(asked)}. Leave it out "
            f"in `accelerate config` or of the launcher's options, or unset it (train.compile compiles steps)"
        )
        error.everywhere = ends_with_parent()
        raise error


def _should_be_launched(environment: Mapping[str, str]) -> str | None:
    """Return why a process without a place must not train alone: others were started, or should have been."""
    if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
        return (
            "`accelerate launch --cpu --num_processes N` starts only one process, whatever N is. For several CPU ranks "
            "use `accelerate launch --multi_gpu --num_processes N launch/train.py ... train.device=cpu` or "
            "`torchrun --nproc-per-node N launch/train.py ... train.device=cpu`"
        )
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1:
        return (
            f"Slurm was asked for {tasks} tasks (SLURM_NTASKS), but no launcher has given this one a rank: {tasks} separate "
            f"runs would write to one folder. Start it with srun, which starts a rank for each task, or `shardstep submit`"
        )
    for name in (
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
    ):  # Kubeflow sets them; 1:4 is from 1 to 4, auto a rank per GPU or core
        if not re.fullmatch("[01]?(:1)?", environment.get(name, "")):
            return (
                f"{name}={environment[name]} asks for several ranks, but only torchrun reads it: this one would train alone, "
                f"or separate runs would write to one folder. Start the ranks with `torchrun launch/train.py ...`, or unset "
                f"it for one rank"
            )
    for launcher in LAUNCHERS:
        if launcher.tasks(environment) > 1:
            return (
                f"{launcher.world_size}={environment[launcher.world_size]}, but the other variables of {launcher.name} "
                f"({', '.join(launcher.names())}) are not all set: separate runs would write to one folder. Set "
                f"{', '.join((*PLACE, *MEETING_POINT))} for each process"
            )
    return None


def _remedy_of_place(environment: Mapping[str, str], names: Sequence[str]) -> str:
    """Return what to do about a place with a problem, of which these variables are a part."""
    launcher = launcher_of(environment)
    place = launcher.place(environment) if launcher else None
    unset = f"unset {' '.join(names)}"
    if launcher is None or place is None:
        return (
            f"If that is left over from another program: {unset}. Or start the ranks with torchrun, accelerate launch, "
            f"mpirun or srun, or set {', '.join((*PLACE, *MEETING_POINT))} for each"
        )
    if place.items() <= environment.items():
        return (
            f"{launcher.name} does not say where its ranks meet. Set MASTER_ADDR to the machine of rank 0, and MASTER_PORT "
            f"to a free port there (Open MPI: mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 ...; MPICH: mpiexec -genv "
            f"MASTER_ADDR node1 -genv MASTER_PORT 29500 ...)"
        )
    there = f"rank {place['RANK']} of {place['WORLD_SIZE']}"
    return f"{launcher.name} started this process as {there}: {unset} before it"


def _separate_worlds(environment: Mapping[str, str]) -> str | None:
    """Return why each of several tasks would bring up its own world, or None."""
    world_size, launcher = int(environment.get("WORLD_SIZE", "1")), launcher_of(environment)
    for outer in LAUNCHERS:
        agents = tasks = outer.tasks(environment)
        if "TORCHELASTIC_RUN_ID" in environment:
            agents = int(environment.get("GROUP_WORLD_SIZE", tasks))
        elif launcher not in (None, outer) and environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
            agents = 1  # mpirun on one machine, in one of several tasks of srun
        if world_size < tasks or agents < tasks:
            return (
                f"{outer.name} started {tasks} tasks, but the launcher in this one brings up a separate world of "
                f"{world_size}: {tasks} separate runs would write to one folder. Give torchrun --nnodes and "
                f"--rdzv-endpoint, or start one task"
            )
    return None


@dataclass(frozen=True)
class Threads:
    """How many threads a rank uses, and what limits or chooses that number; "" where it uses every core."""

    count: int
    limit: str


def threads_per_rank(environment: Mapping[str, str], asked: int | None = None) -> int:
    """Return the threads for one rank; see `explained_threads`."""
    return explained_threads(environment, asked).count


def explained_threads(environment: Mapping[str, str], asked: int | None = None) -> Threads:
    """Return the threads for one rank: its share of the cores that its node's ranks may keep busy, or fewer if asked for.

    mpirun may have bound each rank to cores of its own: a rank then has these, at most its share of mpirun's.

    Args:
        asked: train.threads; None takes OMP_NUM_THREADS, unless a launcher set it.
    """
    own = available = usable_cores().count
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    launcher = launcher_of(environment)
    if launcher not in (None, SRUN) and (process := process_of(launcher)):
        with contextlib.suppress(OSError):  # it has ended
            available = usable_cores(Path(f"/proc/{process}")).count
    cores_of_task = environment.get("SLURM_CPUS_PER_TASK") if "SLURM_STEP_NUM_TASKS" in environment else None
    task_is_rank = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("WORLD_SIZE")
    if cores_of_task:
        available, ranks = min(available, int(cores_of_task)), 1 if task_is_rank else ranks
    share = max(1, available // ranks)
    by_variable = asked_threads(environment)
    limits = {own: "", share: f"{count(available, 'core')} for {count(ranks, 'rank')}"} if share < own else {own: ""}
    if asked and by_variable and asked != by_variable:
        limits[asked] = f"train.threads={asked} counts, not OMP_NUM_THREADS={by_variable}"
    elif wish := asked or by_variable:
        limits.setdefault(wish, f"train.threads={asked}" if asked else f"OMP_NUM_THREADS={by_variable}")
    threads = min(limits)
    return Threads(threads, limits[threads])


@dataclass(frozen=True)
class Allocation:
    """The time that a batch system gives this job, in seconds since the epoch."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Seconds from its start to its end."""
        return self.end_s - self.start_s


def allocation() -> Allocation | None:
    """Return Slurm's allocation if it has an end. The job scripts export these variables; Slurm before 23.02 does not."""
    try:
        end_s = float(os.environ["SLURM_JOB_END_TIME"])
        start_s = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))
    except (KeyError, ValueError):
        return None
    return Allocation(start_s, end_s)


def stopped_file() -> Path | None:
    """Return the file in which a job script expects how many steps a stopped and saved run has taken; None without one."""
    given = os.environ.get("SHARDSTEP_STOPPED_FILE")
    return Path(given) if given else None


_LAUNCH_VARIABLES = (
    *(*PLACE, *MEETING_POINT, "GROUP_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"),
    *(name for launcher in LAUNCHERS for name in launcher.names()),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_CPUS_PER_TASK"),
    *("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which launchers give a process its rank and the address of the others."""
    return {name: environment[name] for name in _LAUNCH_VARIABLES if name in environment}


def launcher_variables() -> dict[str, str]:
    """Return those of this process's parent, the launcher's agent if there is one; empty if they cannot be read."""
    return launch_variables(parent_environment())
