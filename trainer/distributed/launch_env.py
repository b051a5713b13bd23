"""The launcher's environment variables: rank, size of the world, end of the allocation. No torch here.

torchrun, accelerate launch, the job scripts and `shardstep train --nproc` all set the same variables; only this module,
world.py and store.py read them.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardstep.configs.cores import asked_threads, parent_environment, usable_cores
from shardstep.configs.errors import InputError
from shardstep.configs.text import count

_OWN = "SHARDSTEP_NPROC"  # set by `shardstep train --nproc`


def rank() -> int:
    """Return this process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int | None:
    """Return how many ranks the launcher starts; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() and "WORLD_SIZE" in os.environ else None


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which prints for all."""
    return rank() == 0


def is_first_rank_of_node() -> bool:
    """Return whether this process is the first on its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_launched() -> bool:
    """Return whether a launcher has given this process a rank."""
    return "RANK" in os.environ


def has_agent() -> bool:
    """Return whether this process has a launcher that reports every exit code except 0 as a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def ends_with_parent() -> bool:
    """Return whether this process must end with its parent: a launcher without which nobody would end the ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ or _OWN in os.environ


def is_restarted() -> bool:
    """Return whether this process replaces one that ended: restarted by torchrun, or in a requeued job."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def cpu_is_forced() -> bool:
    """Return whether `--cpu` or Accelerate's config file restricts Accelerate to the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


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


def check_launch(environment: Mapping[str, str], wanted: int | None) -> None:
    """Compare the world that the environment describes with the requested one.

    Raises:
        InputError: several worlds of one rank would come up, or a world of the wrong size.
    """
    if "RANK" not in environment:
        if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
            raise InputError(
                "`accelerate launch --cpu --num_processes N` starts only one process, whatever N is. For several CPU ranks "
                "use `accelerate launch --multi_gpu --num_processes N launch/train.py ... train.device=cpu` or "
                "`torchrun --nproc-per-node N launch/train.py ... train.device=cpu`"
            )
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        if tasks > 1:
            raise InputError(
                f"Slurm was asked for {tasks} tasks (SLURM_NTASKS), but no launcher has given this one a rank: {tasks} "
                f"separate runs would write to one folder. `shardstep submit` writes job scripts that work; by hand, start "
                f"torchrun or accelerate launch with srun, one per node, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                f"and MASTER_PORT"
            )
    world_size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    agents = int(environment.get("GROUP_WORLD_SIZE", tasks)) if "TORCHELASTIC_RUN_ID" in environment else tasks
    if world_size < tasks or agents < tasks:
        raise InputError(
            f"srun started {tasks} tasks, but the launcher in this one brings up a separate world of {world_size}: {tasks} "
            f"separate runs would write to one folder. Give torchrun --nnodes and --rdzv-endpoint, or start one task"
        )
    if wanted is not None and world_size != wanted:
        raise InputError(
            f"train.world_size={wanted}, but {count(world_size, 'rank')} came up: start {wanted} "
            f"(torchrun --nproc-per-node {wanted} ...), or change train.world_size"
        )


def threads_per_rank(environment: Mapping[str, str], asked: int | None = None) -> int:
    """Return the threads for one rank: its share of the cores that its node's ranks may keep busy, or fewer if asked for.

    Args:
        asked: train.threads; None takes OMP_NUM_THREADS, unless a launcher set it.
    """
    asked = asked or asked_threads(environment) or sys.maxsize
    cores = usable_cores().count
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    cores_of_task = environment.get("SLURM_CPUS_PER_TASK") if "SLURM_STEP_NUM_TASKS" in environment else None
    task_is_rank = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("WORLD_SIZE")
    if cores_of_task:
        cores, ranks = min(cores, int(cores_of_task)), 1 if task_is_rank else ranks
    return max(1, min(cores // ranks, asked))


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
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID"),
    *("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which launchers give a process its rank and the address of the others."""
    return {name: environment[name] for name in _LAUNCH_VARIABLES if name in environment}


def launcher_variables() -> dict[str, str]:
    """Return those of this process's parent, the launcher's agent if there is one; empty if they cannot be read."""
    return launch_variables(parent_environment())
