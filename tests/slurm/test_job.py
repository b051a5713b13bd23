"""What a job does when its ranks have ended, with stand-ins for srun and scontrol; test_cluster.py uses a real Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from shardstep.launch.jobs.job_script import Job, Launcher, render
from tests.conftest import ROOT
from tests.distributed import HANG_S

SRUN = """#!/bin/bash
[ -z "$MARKER" ] || echo "$MARKER" > "$SHARDSTEP_STOPPED_FILE"
echo "restarts $SLURM_RESTART_COUNT, end $SLURM_JOB_END_TIME"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [ "$2" = hostnames ]; then echo n1
elif [ "$2" = show ]; then
  [ "$4" = "$EXPECTED" ] || exit 1
  echo "JobState=$STATE Reason=$REASON Restarts=2 PreemptTime=$PREEMPTED"
  echo "StartTime=2030-01-01T00:00:00 EndTime=2030-01-01T01:00:00"
else
  echo "$*" >> "$CALLS"
  [ "$REFUSES" = no ]
fi
"""
SLEEP = "#!/bin/bash\nexit 0\n"


class Script:
    """A rendered job, and what happens to it."""

    def __init__(self, folder: Path, requeue: bool = True):
        tools = folder / "bin"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", SLEEP)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.script = render(Job("drill", 1, 1, "10", folder=str(folder), requeue=requeue), ["smoke"])
        self.calls = folder / "calls"
        self._environment = {
            "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "drill", "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "n1", "CALLS": str(self.calls), "EXPECTED": "7", "STATE": "RUNNING", "REASON": "None",
            "PREEMPTED": "None", "REFUSES": "no", "TZ": "UTC",
        }  # fmt: skip

    def run(self, code: int, marker: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it once: srun ends with `code`, and the ranks leave `marker`."""
        given = self._environment | {"CODE": str(code), "MARKER": marker} | environment
        return subprocess.run(["bash"], input=self.script, env=given, capture_output=True, text=True, timeout=HANG_S)

    def requeued(self) -> list[str]:
        return self.calls.read_text().split("\n")[:-1] if self.calls.exists() else []


@pytest.mark.parametrize(
    ("code", "marker", "environment", "ends_with", "requeues"),
    [
        (0, "", {}, 0, False),  # finished
        (1, "", {}, 1, False),  # failed
        (2, "", {}, 2, False),  # bad input
        (0, "40 signal", {}, 85, True),  # stopped under an agent, which ends with 0
        (85, "40 signal", {}, 85, True),  # ... and under srun
        (1, "40 signal", {}, 1, True),  # an agent that was signalled itself
        (0, "40 signal", {"STATE": "COMPLETING", "REASON": "TimeLimit"}, 85, True),
        (0, "40 signal", {"STATE": "COMPLETING"}, 85, False),  # cancelled, or Slurm requeues by itself
        (0, "40 person", {}, 85, False),  # the file STOP
        (143, "", {"PREEMPTED": "2030-01-01T00:10:00"}, 143, True),  # preempted before python had a handler
        (143, "", {"STATE": "COMPLETING", "REASON": "TimeLimit"}, 143, True),
        (143, "", {"STATE": "COMPLETING"}, 143, False),  # cancelled as early
        (0, "", {"PREEMPTED": "2030-01-01T00:10:00"}, 0, False),  # preempted, but finished
    ],
)
def test_what_follows(
    tmp_path: Path, code: int, marker: str, environment: dict[str, str], ends_with: int, requeues: bool
) -> None:
    script = Script(tmp_path)
    result = script.run(code, marker, **environment)
    assert result.returncode == ends_with, result.stdout + result.stderr
    assert script.requeued() == (["requeue 7"] if requeues else [])
    assert ("; requeued" in result.stdout) == requeues


def test_no_requeue(tmp_path: Path) -> None:
    script = Script(tmp_path, requeue=False)
    result = script.run(0, "40 signal", SHARDSTEP_REQUEUE="yes")  # the submitting shell's does not count
    assert result.returncode == 85
    assert "not requeued, as requested" in result.stdout
    assert not script.requeued()


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    script = Script(tmp_path)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "EXPECTED": "7_2"}
    script.run(0, "40 signal", **array)
    assert script.requeued() == ["requeue 7_2"]  # "7" would be the whole array
    assert (tmp_path / "logs" / "drill-7_2").is_dir()


def test_starts_without_a_step_are_counted(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.run(0, "0 signal").returncode == 85
    assert script.run(0, "0 signal", PREEMPTED="2030-01-01T00:10:00").returncode == 85  # had no time: does not count
    assert script.run(0, "0 signal").returncode == 85
    assert len(script.requeued()) == 3
    result = script.run(0, "0 signal")
    assert result.returncode == 75
    assert "was started 3 times without a new step" in result.stderr
    assert len(script.requeued()) == 3
    assert script.run(0, "5 signal").returncode == 85  # a step: all is well again
    assert script.run(0, "0 signal").returncode == 85
    assert len(script.requeued()) == 5


def test_a_refused_requeue_is_a_failure(tmp_path: Path) -> None:
    script = Script(tmp_path)
    result = script.run(0, "40 signal", REFUSES="yes")
    assert result.returncode == 85
    assert len(script.requeued()) == 5  # tried again: the controller may be restarting
    assert "could not be requeued; submit it again to resume" in result.stderr
    assert "; requeued" not in result.stdout


def test_a_stale_stopped_file_does_not_count(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(0, "40 signal")
    assert script.run(1).returncode == 1  # crashed in its second start
    assert len(script.requeued()) == 1


def test_ranks_get_restarts_and_end_time_from_slurm(tmp_path: Path) -> None:
    result = Script(tmp_path).run(0, SLURM_RESTART_COUNT="9", SLURM_TIME_FORMAT="relative")
    assert "job 7, start 3: 1 x 1 ranks, first node n1" in result.stdout
    assert "restarts 2, end 1893459600" in result.stdout  # 2030-01-01T01:00:00Z


@pytest.mark.parametrize(
    ("name", "launcher", "added"),
    [
        ("torchrun", "torchrun", ""),
        ("accelerate", "accelerate", ""),
        ("srun", "srun", ""),
        ("sweep", "torchrun", " optimizer.name=adam optimizer.lr=0.001 run.name=sweep-adam"),
    ],
)
def test_scripts_by_hand_run_what_submit_renders(name: str, launcher: Launcher, added: str, tmp_path: Path) -> None:
    script = Script(tmp_path)
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\ndeclare -f task\necho "$TASKS $PYTHON: ${*: -$TASKS}"\n')
    given = {"LOG_FOLDER": str(tmp_path / "logs"), "PYTHON": "py", "SLURM_ARRAY_TASK_ID": "1", "EXPECTED": "7"}
    outputs = []
    for text, ranks in (
        ((ROOT / "slurm" / f"{name}.sbatch").read_text(), {"RANKS_PER_NODE": "2", "SLURM_NTASKS_PER_NODE": "2"}),
        (render(Job("drill", 1, 2, "10", launcher, folder=str(ROOT), python="py"), ["smoke", *added.split()]), {}),
    ):
        script.script = f"set -- smoke\ncd {ROOT}\n{text}"
        result = script.run(0, **given, **ranks, TASKS=str(2 + len(added.split())))
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    assert f"py: smoke train.world_size=2{added}\n" in outputs[0]
