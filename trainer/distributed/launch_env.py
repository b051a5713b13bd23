"""What the launcher has told this process: its rank, the size of the world, and when the allocation ends. No torch here.

torchrun, accelerate launch, the job scripts and `shardstep train --nproc` all speak through the same variables of the
environment; only this module and runtime.py read them.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardstep.configs.errors import InputError

_OWN = "SHARDSTEP_NPROC"  # set by `shardstep train --nproc`


def rank() -> int:
    """This process's place in the world; 0 where no launcher has given it one."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process is the one that speaks to the person."""
    return rank() == 0


def is_first_rank_of_node() -> bool:
    """Whether this process is the first of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_launched() -> bool:
    """Whether some launcher has given this process a rank."""
    return "RANK" in os.environ


def has_agent() -> bool:
    """Whether a launcher started this process that reports any exit code but 0 as a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def ends_with_parent() -> bool:
    """Whether the parent is a launcher that watches over this process: once it is gone, nobody would end the ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ or _OWN in os.environ


def is_restarted() -> bool:
    """Whether a launcher has started this process again, in the place of one that ended: torchrun, or a requeued job."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def cpu_is_forced() -> bool:
    """Whether Accelerate was told to stay on the CPU, by `--cpu` or its config file."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def ignored_precision() -> str | None:
    """The precision given to `accelerate launch`, if it has any: the recipe's counts."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if given == "no" else given


def environment_of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables by which a launcher on one machine tells a process its place."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _OWN: "1",
    }


# --- the world that was asked for ------------------------------------------------------------------------------------


def check_launch(environment: Mapping[str, str], wanted: int | None) -> None:
    """Compare the world that the environment describes with the one that was asked for.

    Args:
        environment: os.environ.
        wanted: train.world_size, if the recipe has it.

    Raises:
        InputError: several worlds of one would come up, or one of another size than asked for.
    """
    if "RANK" not in environment:
        if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
            raise InputError(
                "`accelerate launch --cpu --num_processes N` starts one process only, whatever N is. For several CPU ranks "
                "use `accelerate launch --multi_gpu --num_processes N launch/train.py ... train.device=cpu` or "
                "`torchrun --nproc-per-node N launch/train.py ... train.device=cpu`"
            )
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        if tasks > 1:
            raise InputError(
                f"Slurm was asked for {tasks} tasks (SLURM_NTASKS), but no launcher has told this one its rank: {tasks} "
                f"separate runs would write to one folder. `shardstep submit` writes job scripts that work; by hand, start "
                f"torchrun or accelerate launch with srun, one per node, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                f"and MASTER_PORT"
            )
    world_size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    agents = int(environment.get("GROUP_WORLD_SIZE", tasks)) if "TORCHELASTIC_RUN_ID" in environment else tasks
    if world_size < tasks or agents < tasks:
        raise InputError(
            f"srun started {tasks} tasks, but the launcher in this one brings up a world of {world_size} by itself: {tasks} "
            f"separate runs would write to one folder. Give torchrun --nnodes and --rdzv-endpoint, or start one task"
        )
    if wanted is not None and world_size != wanted:
        raise InputError(
            f"train.world_size={wanted}, but {world_size} {'rank' if world_size == 1 else 'ranks'} came up: "
            f"start {wanted} (torchrun --nproc-per-node {wanted} ...), or change train.world_size"
        )


def threads_per_rank(environment: Mapping[str, str]) -> int:
    """Threads for the operations of one rank: the cores that are its own, or its part of those that a node's ranks share.

    torchrun and accelerate launch set OMP_NUM_THREADS=1 where it is unset, so that variable says nothing here.
    """
    cores = len(os.sched_getaffinity(0))
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    cores_of_task = environment.get("SLURM_CPUS_PER_TASK") if "SLURM_STEP_NUM_TASKS" in environment else None
    task_is_rank = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("WORLD_SIZE")
    if cores_of_task:
        return max(1, min(cores, int(cores_of_task)) // (1 if task_is_rank else ranks))
    return max(1, cores // ranks)


# --- the allocation --------------------------------------------------------------------------------------------------


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
    """Slurm's, if it has an end: the job scripts export these variables where Slurm itself (before 23.02) does not."""
    try:
        end_s = float(os.environ["SLURM_JOB_END_TIME"])
        start_s = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))
    except (KeyError, ValueError):
        return None
    return Allocation(start_s, end_s)


def stopped_file() -> Path | None:
    """Where a job script wants to read that the run was stopped and saved, and how many steps it had taken."""
    given = os.environ.get("SHARDSTEP_STOPPED_FILE")
    return Path(given) if given else None


# --- all that was said, for a preflight ---------------------------------------------------------------------------

_LAUNCH_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID"),
    *("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What launchers have told a process, of its place and of the way to the others."""
    return {name: environment[name] for name in _LAUNCH_VARIABLES if name in environment}


def launcher_variables() -> dict[str, str]:
    """The same of this process's parent, which is the launcher's agent if there is one; empty where it cannot be read."""
    try:
        with open(f"/proc/{os.getppid()}/environ", errors="replace") as file:
            pairs = (entry.partition("=") for entry in file.read().split("\0"))
            return launch_variables({name: value for name, _, value in pairs})
    except OSError:
        return {}
