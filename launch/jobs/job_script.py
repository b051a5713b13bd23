"""A job to the script that Slurm runs: what is asked for becomes #SBATCH lines, the rest is a script of slurm/."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

Launcher = Literal["torchrun", "accelerate", "srun"]


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm for a run. Empty strings and None leave a matter to the cluster's defaults."""

    name: str
    """What squeue shows, and the beginning of the log's name."""
    nodes: int
    """Machines."""
    ranks_per_node: int
    """Ranks on each."""
    time: str
    """Longest running time in Slurm's forms: minutes, hours:minutes:seconds, days-hours, ..."""
    launcher: Launcher = "torchrun"
    """What starts the ranks of a node."""
    gpus_per_node: int = 0
    """GPUs on each machine; 0 trains on CPU cores."""
    cpus_per_rank: int = 1
    """Cores of each rank: one for its loop on a GPU, and one for each of its readers."""
    stop_before_s: int = 120
    """Seconds before the end at which all ranks are asked to save."""
    requeue: bool = True
    """Whether a job that was stopped goes on by itself, in the same job."""
    options: dict[str, str | None] = field(default_factory=dict)
    """Other options of sbatch: partition, account, mem, ...; None where one takes no value."""
    setup: Sequence[str] = ()
    """Lines of shell that come before all else, such as `module load cuda`."""
    container: Sequence[str] = ()
    """Words of a command that runs what follows it in a container."""
    python: str = "python"
    """The interpreter, as the nodes see it."""
    folder: str = "."
    """Where the job runs: what relative paths are relative to."""
    log_folder: str = "logs"
    """Where logs go, seen from `folder`."""
    array: str = ""
    """Which of the points to run, and how many at once, in Slurm's form: 0-5%2. Needed if there are points."""


def render(job: Job, arguments: Sequence[str], points: Sequence[Sequence[str]] = (), command: str = "") -> str:
    """Write the script of a job.

    Args:
        job: what is asked for.
        arguments: the recipe and its overrides; any text.
        points: for a job array, what each task adds to them.
        command: that this script comes from, for its head.

    Returns:
        A whole script: it needs no other file.
    """
    directives: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node if job.launcher == "srun" else 1),
        "cpus-per-task": str(job.cpus_per_rank * (1 if job.launcher == "srun" else job.ranks_per_node)),
        "gpus-per-node": str(job.gpus_per_node or ""),
        "time": job.time,
        "signal": f"USR1@{job.stop_before_s}",
        "open-mode": "append",
        "output": f"{job.log_folder}/%x-{'%A_%a' if points else '%j'}.log",
        "array": job.array if points else "",
        **job.options,
    }
    lines = ["#!/bin/bash"]
    if command:
        lines += [f"# Written by: {' '.join(command.split())}"]
    lines += [
        f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={sbatch_word(value)}"
        for name, value in directives.items()
        if value != ""
    ]
    lines += ["#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue", ""]
    lines += [f"cd {shlex.quote(job.folder)} || exit 2", *job.setup, f"set -- {shlex.join(arguments)}"]
    if points:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f'  {number}) set -- "$@" {shlex.join(added)} ;;' for number, added in enumerate(points)]
        lines += ['  *) echo "error: the array has no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"]
    lines += [f"LOG_FOLDER={shlex.quote(job.log_folder)}"]
    lines += [f"SHARDSTEP_REQUEUE={'yes' if job.requeue else 'no'}"]
    settings = {
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "PYTHON": shlex.quote(job.python),
        "CONTAINER": shlex.quote(" ".join(job.container)),
    }
    return "\n".join(lines) + "\n" + _body(job.launcher, settings)


def sbatch_word(value: str) -> str:
    """A value as sbatch reads it in an #SBATCH line: spaces, quotes and number signs are kept."""
    if re.fullmatch(r"[\w./:@%+=,&|*!\[\]()~^-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _body(launcher: str, settings: dict[str, str]) -> str:
    """A script of slurm/ without its head, with other settings, and with what it sources."""
    folder = resources.files("shardstep.slurm")
    script = (folder / f"{launcher}.sbatch").read_text()
    body = script[re.search(r"^RANKS_PER_NODE=", script, flags=re.MULTILINE).start() :]  # type: ignore[union-attr]
    for name, value in settings.items():
        (line,) = (text for text in body.splitlines() if text.startswith(f"{name}="))
        comment = line.partition("  #")[2]
        body = body.replace(line, f"{name}={value}{f'  #{comment}' if comment else ''}", 1)
    source = ". slurm/job.sh\n"
    assert body.endswith(source)
    return body.removesuffix(source) + (folder / "job.sh").read_text()
