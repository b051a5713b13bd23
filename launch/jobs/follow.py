"""A submitted job, shown until it ends: its state in Slurm, and the progress of its run."""

import subprocess
import sys
import time
from pathlib import Path

from shardstep.launch.cli import FAILED, INTERRUPTED
from shardstep.trainer.monitoring.metric_tail import MetricTail
from shardstep.trainer.monitoring.status import describe_line

_POLL_S = 2.0
_PROGRESS_S = 10.0  # between lines about training steps; evaluations always get one
_MOST_SILENCE = 15  # looks at Slurm without an answer: its controller may be restarting
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


def follow(job_id: str, folder: Path | None) -> int:
    """Print each change of a job's state and its run's metrics until it has ended; Ctrl-C leaves the job alone.

    Args:
        job_id: as sbatch told it.
        folder: of the run; None for an array, whose tasks' states are shown.

    Returns:
        0 if the job completed, its own exit code if it had one, else 1.
    """
    told, shown_s, silence = "", 0.0, 0
    lines = MetricTail(folder, begin_at="end") if folder else None
    try:
        while True:
            tasks = _tasks(job_id)
            silence = 0 if tasks else silence + 1
            if silence and silence < _MOST_SILENCE:
                time.sleep(_POLL_S)
                continue
            state = describe(tasks)
            if state != told:
                print(f"{time.strftime('%H:%M:%S')}  {state}", flush=True)
                told = state
            for line in lines.new() if lines else ():
                if line["kind"] == "eval" or time.monotonic() - shown_s > _PROGRESS_S:
                    shown_s = time.monotonic()
                    print(f"{time.strftime('%H:%M:%S')}  {describe_line(line)}", flush=True)
            if not tasks or all(task["JobState"] in _ENDED for task in tasks):
                return exit_code(tasks)
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job_id} goes on. `scancel {job_id}` saves and ends it", file=sys.stderr)
        return INTERRUPTED


def describe(tasks: list[dict[str, str]]) -> str:
    """The state of a job, or of the tasks of an array, in a few words."""
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
    """Of the first task that did not complete; 0 if all did, 1 if nothing is known."""
    if not tasks:
        return FAILED
    for task in tasks:
        if task["JobState"] != "COMPLETED":
            return int(task.get("ExitCode", "1:0").split(":")[0]) or FAILED
    return 0


def _tasks(job_id: str) -> list[dict[str, str]]:
    """What Slurm knows of a job: a mapping for each task of an array, or one."""
    result = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True)
    if result.returncode:
        return []
    return [
        {name: value for name, equals, value in (word.partition("=") for word in line.split()) if equals}
        for line in result.stdout.splitlines()
        if "JobState=" in line
    ]
