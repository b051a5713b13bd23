"""A job to the script that Slurm runs: slurm/submit.template, filled in, with a launcher's task and job.sh from slurm/."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Literal

Launcher = Literal["torchrun", "accelerate", "srun"]


@dataclass(frozen=True)
class Job:
    """What to ask Slurm for. An empty string or None leaves the choice to the cluster's defaults."""

    name: str
    """Shown by squeue; the log's name begins with it."""
    nodes: int
    ranks_per_node: int
    time: str
    """Time limit in one of Slurm's forms: minutes, hours:minutes:seconds, days-hours, ..."""
    launcher: Launcher = "torchrun"
    gpus_per_node: int = 0
    """GPUs on each machine; 0 trains on CPU cores."""
    cpus_per_rank: int = 1
    """Cores of each rank: one for the training loop of a GPU, and one for each reader."""
    stop_before_s: int = 120
    """Seconds before the time limit at which all ranks are asked to save."""
    requeue: bool = True
    """Whether a job that was stopped is requeued and resumes by itself."""
    options: dict[str, str | None] = field(default_factory=dict)
    """Other options of sbatch: partition, account, mem, ...; None for one that takes no value."""
    setup: Sequence[str] = ()
    """Shell lines that run first, such as `module load cuda`."""
    container: Sequence[str] = ()
    """Words of a command that runs the command after it in a container."""
    python: str = "python"
    """Path of the interpreter on the nodes."""
    folder: str = "."
    """Working directory of the job; relative paths start here."""
    log_folder: str = "logs"
    """Where logs go, relative to `folder`."""
    array: str = ""
    """Tasks of the array to run, and how many at once, in Slurm's form: 0-5%2. Required if there are points."""


def render(job: Job, arguments: Sequence[str], points: Sequence[Sequence[str]] = (), command: str = "") -> str:
    """Return the script of a job; it needs no other file.

    Args:
        job: what to ask Slurm for.
        arguments: the recipe and its overrides; any text.
        points: for a job array, what each task adds to the arguments.
        command: the command that writes the script, for its head.
    """
    of_task = job.launcher == "srun"  # a task is a rank, else a node
    directives: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node if of_task else 1),
        "cpus-per-task": str(job.cpus_per_rank * (1 if of_task else job.ranks_per_node)),
        "gpus-per-node": str(job.gpus_per_node or ""),
        "time": job.time,
        "signal": f"USR1@{job.stop_before_s}",
        "open-mode": "append",
        "output": f"{job.log_folder}/%x-{'%A_%a' if points else '%j'}.log",
        "array": job.array if points else "",
        **job.options,
        "requeue" if job.requeue else "no-requeue": None,
    }
    head = [f"# Written by: {' '.join(command.split())}"] if command else []
    head += [
        f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={sbatch_word(value)}"
        for name, value in directives.items()
        if value != ""
    ]
    cases = [f'  {number}) set -- "$@" {shlex.join(added)} ;;' for number, added in enumerate(points)]
    if cases:
        missing = '  *) echo "error: the array has no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
        cases = ["case $SLURM_ARRAY_TASK_ID in", *cases, missing, "esac"]
    files = resources.files("shardstep.slurm")
    return Template((files / "submit.template").read_text()).substitute(
        head=_lines(head),
        folder=shlex.quote(job.folder),
        setup=_lines(job.setup),
        arguments=shlex.join(arguments),
        points=_lines(cases),
        log_folder=shlex.quote(job.log_folder),
        requeue="yes" if job.requeue else "no",
        ranks_per_node=job.ranks_per_node,
        python=shlex.quote(job.python),
        container=shlex.quote(" ".join(job.container)),
        task=(files / f"task_{job.launcher}.sh").read_text(),
        job=(files / "job.sh").read_text(),
    )


def sbatch_word(value: str) -> str:
    """Quote a value for an #SBATCH line, so that spaces, quotes and number signs are kept."""
    if re.fullmatch(r"[\w./:@%+=,&|*!\[\]()~^-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
