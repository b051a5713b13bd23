"""The variables of mpirun, mpiexec, srun and submitit, under the names that torchrun gives them. No torch here.

Each process that they start knows its rank. `adopt_launch` also finds out where the ranks meet, which torchrun would say.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""The variables that give a process its place in the world."""
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
"""Where the ranks meet: a host, and a port on which rank 0 or the launcher's agent listens."""


@dataclass(frozen=True)
class Launcher:
    """A program that starts the ranks, and its own names for the variables of `PLACE`."""

    name: str
    rank: str
    local_rank: str
    world_size: str
    local_world_size: str

    def tasks(self, environment: Mapping[str, str]) -> int:
        """Return how many processes it has started, of which this is one; 1 if it started none."""
        size = environment.get(self.world_size, "")
        return int(size) if size.isdecimal() else 1

    def place(self, environment: Mapping[str, str]) -> dict[str, str] | None:
        """Return this process's place; None unless this launcher started it, and others with it."""
        values = {name: environment.get(own, "") for name, own in zip(PLACE, self.names(), strict=True)}
        if self is SRUN:
            node = environment.get("SLURM_NODEID", "")
            values["LOCAL_WORLD_SIZE"] = _tasks_on_node(values["LOCAL_WORLD_SIZE"], node)
        return values if self.tasks(environment) > 1 and all(values.values()) else None

    def names(self) -> tuple[str, str, str, str]:
        """Return its names, in the order of `PLACE`."""
        return self.rank, self.local_rank, self.world_size, self.local_world_size


SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
OPEN_MPI = Launcher(
    "mpirun",
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
LAUNCHERS = (
    OPEN_MPI,
    Launcher("mpiexec", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    Launcher(  # MVAPICH
        "mpirun_rsh",
        *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    Launcher(  # its executor for one machine; on Slurm it uses srun
        "submitit",
        *("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_NTASKS"),
    ),
    SRUN,  # last: mpirun itself may use it, to start its daemons
)


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """Return the innermost of these launchers that started this process and others with it."""
    return next((launcher for launcher in LAUNCHERS if launcher.place(environment)), None)


def adopt_launch(environment: MutableMapping[str, str] | None = None) -> None:
    """Add torchrun's variables to `environment`, by default this process's, if a launcher has others for the same.

    Keeps what is set, and does nothing for a process that was started alone. `launch_env.check_launch` reports what is
    missing or contradictory afterwards.
    """
    environment = os.environ if environment is None else environment
    launcher = launcher_of(environment)
    place = launcher.place(environment) if launcher else _place_by_hand(environment)
    if not place or not _agrees(environment, place):
        return
    environment.update(place)
    if launcher is OPEN_MPI:
        environment["TERM"] = "dumb"  # it gives the ranks a pseudo-terminal, even if it writes to a file itself
    if launcher:
        for name, value in _meeting_point(environment, launcher).items():
            environment.setdefault(name, value)


def _agrees(environment: Mapping[str, str], place: Mapping[str, str]) -> bool:
    """Return whether those variables of a place that are already set are not left over from something else.

    A lone RANK or LOCAL_RANK may be right by chance on one rank, which would then wait for those that refuse it.
    """
    given = {name for name in PLACE if name in environment}
    is_lone = "WORLD_SIZE" not in given if "RANK" in given else "LOCAL_RANK" in given
    return not is_lone and all(environment[name] == place.get(name, environment[name]) for name in given)


def _place_by_hand(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the local rank of a process that was only given its rank: all ranks are on this machine, or one on each.

    None where that is wrong or incomplete, so that a refusal names what somebody has set, and nothing else.
    """
    rank, world_size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    is_right = rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)
    if not is_right or not all(map(environment.get, MEETING_POINT)) or "LOCAL_WORLD_SIZE" in environment:
        return None
    if environment.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
        return {"LOCAL_RANK": environment.get("LOCAL_RANK", rank), "LOCAL_WORLD_SIZE": world_size}
    if "LOCAL_RANK" in environment:
        return None
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # as in the pods of Kubeflow's PyTorchJob


def _meeting_point(environment: Mapping[str, str], launcher: Launcher) -> dict[str, str]:
    """Return where the ranks meet, which all of them compute alike; as much of it as can be known."""
    if environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
        process = process_of(launcher)
        return {"MASTER_ADDR": "127.0.0.1"} | ({"MASTER_PORT": _port(str(process))} if process else {})
    if launcher is SRUN and {"SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"} <= environment.keys():
        first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
        return {
            "MASTER_ADDR": first_node,
            "MASTER_PORT": _port(f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"),
        }
    return {}


def process_of(launcher: Launcher) -> int | None:
    """Return the id of the launcher's process on this machine: the nearest ancestor that has no rank."""
    import psutil

    for ancestor in psutil.Process().parents():
        try:
            if launcher.rank not in ancestor.environ():
                return int(ancestor.pid)
        except psutil.Error:  # another user's: the daemon of a batch system
            return int(ancestor.pid)
    return None


def _port(key: str) -> str:
    """Return a port that depends on `key`, below those that the system gives to outgoing connections."""
    return str(20_000 + zlib.crc32(key.encode()) % 12_000)


def _tasks_on_node(text: str, node: str) -> str:
    """Return a node's entry in Slurm's list of tasks, such as "2(x3),1" for four nodes; "" if it has none."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    tasks = [number for number, times in found for _ in range(int(times or 1))]
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else ""
