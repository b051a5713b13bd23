"""Follow a submitted job until it ends: print its state in Slurm, and the progress of its run."""

import subprocess
import sys
import time
from pathlib import Path

from shardstep.launch.cli import FAILED, INTERRUPTED
from shardstep.trainer.monitoring.status import describe_line
from shardstep.trainer.run_dir import RunDir

_POLL_S = 2.0
_PROGRESS_S = 10.0  # between lines about training steps; evaluations always get one
_MOST_SILENCE = 15  # questions to Slurm without an answer: its controller may be restarting
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


def follow(job_id: str, folder: Path | None) -> int:
    """Print each change of a job's state and its run's metrics until it has ended; Ctrl-C leaves the job alone.

    Args:
        job_id: as sbatch printed it.
        folder: of the run; None for an array, whose tasks' states are printed.

    Returns:
        0 if the job completed, its own exit code if it had one, else 1.
    """
    printed, printed_s, silence = "", 0.0, 0
    run = RunDir(folder) if folder else None
    lines = run.tail(begin_at="end") if run else None
    try:
        while True:
            tasks = _tasks(job_id)
            silence = 0 if tasks else silence + 1
            if silence and silence < _MOST_SILENCE:
                time.sleep(_POLL_S)
                continue
            state = describe(tasks)
            if state != printed:
                _print(state)
                printed = state
            for line in lines.new() if lines else ():
                if line["kind"] == "eval" or time.monotonic() - printed_s > _PROGRESS_S:
                    printed_s = time.monotonic()
                    _print(describe_line(line))
            if not tasks or all(task["JobState"] in _ENDED for task in tasks):
                if run and run.is_run:
                    _print(f"the run in {folder}: {run.state()}")
                return exit_code(tasks)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job_id} continues. `scancel {job_id}` saves and ends it", file=sys.stderr)
        return INTERRUPTED


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def describe(tasks: list[dict[str, str]]) -> str:
    """Describe the state of a job, or of the tasks of an array, in a few words."""
    if not tasks:
        return "Slurm no longer knows this job"
    if len(tasks) == 1:
        task = tasks[0]
        restarts = int(task.get("Restarts", "0"))
        again = f", start {restarts + 1}" if restarts else ""
        where = f" on {task['NodeList']}" if task["JobState"] == "RUNNING" else ""
        why = f" ({task['Reason']})" if task.get("Reason", "None") != "None" else ""
        return f"{task['JobState']}{where}{why}{again}"
    states = [task["JobState"] for task in tasks]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def exit_code(tasks: list[dict[str, str]]) -> int:
    """Return the exit code of the first task that did not complete; 0 if all did, 1 if nothing is known."""
    if not tasks:
        return FAILED
    for task in tasks:
        if task["JobState"] != "COMPLETED":
            return int(task.get("ExitCode", "1:0").split(":")[0]) or FAILED
    return 0


def _tasks(job_id: str) -> list[dict[str, str]]:
    """Ask Slurm about a job: a mapping for each task of an array, or one."""
    result = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True)
    if result.returncode:
        return []
    return [
        {name: value for name, equals, value in (word.partition("=") for word in line.split()) if equals}
        for line in result.stdout.splitlines()
        if "JobState=" in line
    ]
