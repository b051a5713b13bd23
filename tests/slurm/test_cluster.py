"""Real training on a real Slurm of virtual nodes, under all three launchers, for `make drills`."""

import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shardstep.launch.jobs.job_script import Job, render
from shardstep.trainer.checkpoints import checkpoint_files
from tests.conftest import ROOT
from tests.own_code import write_own_recipe
from tests.runs import read_lines, train_lines, write_recipe
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.drill, pytest.mark.alone]

STEPS = 700  # of a few milliseconds: a signal that comes when the first are written down still finds the run at work
LAUNCHERS = ["torchrun", "accelerate", "srun"]
SECTIONS: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
    "optimizer": {"name": "adam", "lr": 0.001},
    "train": {
        "global_batch_size": 8,
        "duration": f"{STEPS} steps",
        "device": "cpu",
        "precision": "fp32",
        "memory_format": "contiguous",
    },
    "checkpoint": {"every": "100000 steps"},
    "eval": {"every": "100000 steps"},
    "log": {"every": "20 steps"},
}


@dataclass
class Submitted:
    """A job, and the folder of its run."""

    cluster: Cluster
    job: str
    folder: Path

    def steps(self) -> int:
        """The last step that the run has written down."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = train_lines(self.folder / "run") if path.exists() and path.stat().st_size else []
        return lines[-1]["step"] if lines else 0

    def wait_step(self, step: int, timeout_s: float = 90) -> None:
        """Wait until the run has come past a step."""
        self.cluster.wait(self.job, lambda facts: self.steps() > step, f"a step after {step}", timeout_s)

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "run" / "summary.json").read_text())

    def log(self) -> str:
        return self.cluster.log(self.cluster.show(self.job))

    def end(self, timeout_s: float = 120) -> str:
        return self.cluster.wait_end(self.job, timeout_s)["JobState"]


def submit(cluster: Cluster, folder: Path, shards: Path, job: Job, *overrides: str, **sections: Any) -> Submitted:
    """Submit a run with a separate folder."""
    recipe = write_recipe(folder, shards, **SECTIONS | sections)
    (folder / "logs").mkdir(exist_ok=True)
    job = replace(job, folder=str(folder), python=sys.executable)
    found = cluster.sh(["sbatch", "--parsable"], text=render(job, [str(recipe), *overrides]), cwd=folder)
    return Submitted(cluster, found.stdout.strip(), folder)


def world(launcher: str, **options: Any) -> Job:
    """Two nodes with two ranks each."""
    return replace(Job("drill", nodes=2, ranks_per_node=2, time="10", launcher=launcher), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A finished run on two nodes with two ranks each that nobody disturbed."""
    submitted = submit(cluster, tmp_path_factory.mktemp("undisturbed"), shards, world("srun"))
    assert submitted.end() == "COMPLETED", submitted.log()
    return submitted


def assert_equal(one: Submitted, another: Submitted) -> None:
    """The same weights, bit for bit, and the same losses, each once."""
    run, other = one.folder / "run", another.folder / "run"
    first, second = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert all((first[name] == second[name]).all() for name in first)
    names = ("kind", "step", "loss", "accuracy")
    lines, others = (
        [{k: line.get(k) for k in names} for line in read_lines(path / "metrics.jsonl")] for path in (run, other)
    )
    assert lines == others


def restarts_of(submitted: Submitted) -> int:
    return int(submitted.cluster.show(submitted.job)["Restarts"])


def preempt(submitted: Submitted) -> None:
    """Let a more urgent job take all nodes for a moment."""
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    submitted.cluster.wait_end(submitted.cluster.sh(urgent).stdout.strip())


def rank_of(submitted: Submitted, rank: int) -> int:
    """The process of a rank, as the machine numbers it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        of_run = str(submitted.folder).encode() in command and b"shardstep.launch.train" in command
        if of_run and b"python" in command.split(b"\0")[0] and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"rank {rank} does not run")


# --- under each launcher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_start_to_finish(cluster: Cluster, shards: Path, tmp_path: Path, undisturbed: Submitted, launcher: str) -> None:
    submitted = undisturbed if launcher == "srun" else submit(cluster, tmp_path, shards, world(launcher))
    assert submitted.end() == "COMPLETED", submitted.log()
    assert_equal(submitted, undisturbed)
    assert submitted.summary()["world_size"] == 4
    assert "4 ranks, cpu" in submitted.log()
    logs = [path.name for path in (submitted.folder / "logs" / f"drill-{submitted.job}").rglob("*.log")]
    assert len([name for name in logs if "stderr" not in name]) == 4, logs  # one a rank


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_without_the_environment_of_its_submission(
    cluster: Cluster, shards: Path, tmp_path: Path, undisturbed: Submitted, launcher: str
) -> None:
    submitted = submit(cluster, tmp_path, shards, world(launcher, options={"export": "NONE"}))
    assert submitted.end() == "COMPLETED", submitted.log()
    assert_equal(submitted, undisturbed)
    assert submitted.summary()["world_size"] == 4


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 4), (1, 2)])
def test_srun_alone_starts_the_ranks(cluster: Cluster, shards: Path, tmp_path: Path, nodes: int, tasks: int) -> None:
    """No job script, and no variables but those of srun."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    srun = ["srun", f"-N{nodes}", f"-n{tasks}", "-t5", sys.executable, str(ROOT / "launch" / "train.py"), str(recipe)]
    result = cluster.sh([*srun, "train.duration=20 steps"], cwd=tmp_path, timeout_s=170)
    assert f"{tasks} ranks, cpu" in result.stdout
    assert result.stdout.count("done:") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_stops_and_preemptions(
    cluster: Cluster, shards: Path, tmp_path: Path, undisturbed: Submitted, launcher: str
) -> None:
    """Asked to save, preempted at once, preempted with time to save: one run goes through all of it, to the same end."""
    submitted = submit(cluster, tmp_path, shards, world(launcher))
    submitted.wait_step(0)
    cluster.sh(["scancel", "-s", "USR1", submitted.job])  # what --signal=USR1@S does before the time limit
    cluster.wait_restart(submitted.job, 1)
    assert "stopped by SIGUSR1: step" in submitted.log()

    submitted.wait_step(submitted.steps())
    before = submitted.steps()
    preempt(submitted)  # in this partition, without grace: Slurm itself requeues
    cluster.sh(["scontrol", "update", f"JobId={submitted.job}", "Partition=spot"])
    cluster.wait_restart(submitted.job, 2)
    assert "not requeued from here, because Slurm is ending it" in submitted.log()

    submitted.wait_step(max(before, submitted.steps()))
    preempt(submitted)  # in that one, with 5 s: a job that ends in them is not requeued by Slurm, but by its script
    cluster.wait_restart(submitted.job, 3)
    assert submitted.log().count("stopped and saved; requeued") == 2  # which is said when Slurm has done it
    assert submitted.end() == "COMPLETED", submitted.log()
    assert_equal(submitted, undisturbed)
    assert submitted.summary()["restarts"] == restarts_of(submitted) == 3


@pytest.mark.parametrize("launcher", ["torchrun"])
def test_preempted_before_it_can_listen(cluster: Cluster, shards: Path, tmp_path: Path, launcher: str) -> None:
    """The launcher is still importing torch: it dies of SIGTERM, and Slurm does not requeue what ends in its grace time."""
    job = world(launcher, nodes=1, options={"partition": "spot"})
    submitted = submit(cluster, tmp_path, shards, job, "train.duration=20 steps")
    cluster.wait(submitted.job, lambda facts: "start 1:" in cluster.log(facts), "its start")
    preempt(submitted)
    assert submitted.end() == "COMPLETED", submitted.log()
    assert restarts_of(submitted) == 1
    assert submitted.summary()["step"] == 20


def test_stopped_by_a_person(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """No requeue, and no success either, on which another job could depend."""
    submitted = submit(cluster, tmp_path, shards, world("srun", nodes=1), "train.duration=1000000 steps")
    submitted.wait_step(0)
    (tmp_path / "run" / "STOP").touch()
    assert submitted.end() == "FAILED", submitted.log()
    assert cluster.show(submitted.job)["ExitCode"] == "85:0"
    assert restarts_of(submitted) == 0
    assert "stopped by the file STOP and saved; not requeued" in submitted.log()
    assert submitted.summary()["status"] == "preempted"


def test_only_the_task_that_is_asked_is_requeued(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """The last task of an array has the array's id as its own: what is done to that is done to all tasks."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS | {"train": SECTIONS["train"] | {"duration": "1000000 steps"}})
    (tmp_path / "logs").mkdir()
    job = world("torchrun", nodes=1, ranks_per_node=1, folder=str(tmp_path), python=sys.executable, array="0-1")
    script = render(job, [str(recipe)], [[f"run.dir={tmp_path}/0/run"], [f"run.dir={tmp_path}/1/run"]])
    array = cluster.sh(["sbatch", "--parsable"], text=script, cwd=tmp_path).stdout.strip()
    first, last = (Submitted(cluster, f"{array}_{number}", tmp_path / str(number)) for number in range(2))
    for submitted in (first, last):
        submitted.wait_step(0)
    cluster.sh(["scancel", first.job])
    assert first.end() == "CANCELLED"
    cluster.sh(["scancel", "-s", "USR1", last.job])
    cluster.wait_restart(last.job, 1)
    last.wait_step(last.summary()["step"])
    assert cluster.show(first.job)["JobState"] == "CANCELLED"
    assert restarts_of(first) == 0
    cluster.sh(["scancel", last.job])
    last.end()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_cancelled_is_saved_and_stays_cancelled(cluster: Cluster, shards: Path, tmp_path: Path, launcher: str) -> None:
    submitted = submit(cluster, tmp_path, shards, world(launcher), "train.duration=1000000 steps")
    submitted.wait_step(0)
    cluster.sh(["scancel", submitted.job])
    assert submitted.end() == "CANCELLED", submitted.log()
    cluster.wait(submitted.job, lambda facts: submitted.summary()["status"] == "preempted", "the summary", 10)
    (saved,) = checkpoint_files.list_checkpoints(submitted.folder / "run" / "checkpoints")
    assert checkpoint_files.step_of(saved) == submitted.summary()["step"] > 0
    assert not checkpoint_files.problems_of(saved)
    CANCELLED.append(submitted)


CANCELLED: list[Submitted] = []  # by the tests above


@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("accelerate", 1), ("srun", 137)])
def test_a_rank_that_crashes_fails_the_job(
    cluster: Cluster, shards: Path, tmp_path: Path, launcher: str, code: int
) -> None:
    submitted = submit(cluster, tmp_path, shards, world(launcher), "train.duration=1000000 steps")
    submitted.wait_step(0)
    os.kill(rank_of(submitted, 3), signal.SIGKILL)
    assert submitted.end() == "FAILED", submitted.log()
    assert cluster.show(submitted.job)["ExitCode"] == f"{code}:0", submitted.log()
    assert restarts_of(submitted) == 0
    assert re.search(r"SIGKILL|Signal 9|Killed|exit code 137", submitted.log()), submitted.log()
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in submitted.log()


def test_bad_input_is_reported_once(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    submitted = submit(cluster, tmp_path, shards, world("srun"), "optimizer.lrr=3")
    assert submitted.end() == "FAILED", submitted.log()
    assert cluster.show(submitted.job)["ExitCode"] == "2:0", submitted.log()
    assert submitted.log().count("optimizer.lrr is not an option of adam; did you mean lr?") == 1, submitted.log()


# --- under one of them ------------------------------------------------------------------------------------------------


def test_cancelled_jobs_stay_cancelled(cluster: Cluster) -> None:
    """Requeued jobs would be back long ago."""
    for submitted in CANCELLED:
        assert cluster.show(submitted.job)["JobState"] == "CANCELLED"
        assert restarts_of(submitted) == 0


def test_power_cut_of_a_node(cluster: Cluster, shards: Path, tmp_path: Path, undisturbed: Submitted) -> None:
    submitted = submit(cluster, tmp_path, shards, world("torchrun"), "checkpoint.every=200 steps")
    submitted.wait_step(220)
    lost = cluster.sh(["scontrol", "show", "hostnames", cluster.show(submitted.job)["NodeList"]]).stdout.split()[1]
    cluster.node("crash", lost)
    cluster.sh(
        ["scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=drill"]
    )  # Slurm itself takes 30 s for that
    cluster.wait_restart(submitted.job, 1)
    assert lost not in cluster.show(submitted.job)["NodeList"]
    cluster.node("start", lost)
    assert submitted.end() == "COMPLETED", submitted.log()
    assert_equal(submitted, undisturbed)


def test_requeue_onto_fewer_nodes(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """The world shrinks in the middle of an epoch: each sample of every epoch is still seen once."""
    submitted = submit(
        cluster, tmp_path, shards, world("torchrun"), "log.sample_keys=true", f"train.duration={STEPS} steps"
    )
    submitted.wait_step(0)
    cluster.sh(["scancel", "-s", "USR1", submitted.job])
    cluster.wait(submitted.job, lambda facts: facts["JobState"] == "PENDING", "the requeue")
    cluster.sh(["scontrol", "update", f"JobId={submitted.job}", "NumNodes=1", "NumTasks=1"])
    assert submitted.end() == "COMPLETED", submitted.log()
    starts = json.loads(
        (checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text()
    )["starts"]
    assert [start["world_size"] for start in starts] == [4, 2]
    lines = [line for path in (tmp_path / "run").glob("samples-rank*.jsonl") for line in read_lines(path)]
    epochs = STEPS // 13  # 101 samples in batches of 8: 13 steps an epoch
    seen = Counter((line["epoch"], line["key"]) for line in lines if line["epoch"] < epochs)
    assert len(seen) == 101 * epochs
    assert set(seen.values()) == {1}


def test_an_array_of_optimizers_from_a_hostile_folder(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """By the command, all tasks on one node at the same time: no port and no folder is shared."""
    folder = tmp_path / "it's a $HOME of `mine`"
    recipe = write_recipe(folder, shards, **SECTIONS)
    command = [
        str(Path(sys.executable).parent / "shardstep"), "submit", str(recipe), "train.duration=300 steps",
        "run.dir=runs/; touch pwned #", "--over", "optimizer.name=sgd,adam,rmsprop", "--ranks-per-node", "2", "--time", "5",
        "--cpus-per-rank", "1", "--sbatch", "nodelist=n1", "--follow",
    ]  # fmt: skip
    dry = cluster.sh([*command, "--dry-run"], cwd=folder)
    tested = cluster.sh(["sbatch", "--test-only"], text=dry.stdout, cwd=folder)
    assert "to start at" in tested.stderr
    followed = cluster.sh(command, cwd=folder, timeout_s=180)
    assert re.search(r"job \d+: recipe on 1 node x 2 ranks, 3 tasks; log: logs/recipe-\d+_\*.log", followed.stdout)
    assert "3 COMPLETED" in followed.stdout
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == [f"; touch pwned #-{name}" for name in ("adam", "rmsprop", "sgd")]
    for run in runs:
        summary = json.loads((folder / "runs" / run / "summary.json").read_text())
        assert (summary["status"], summary["step"], summary["world_size"]) == ("finished", 300, 2)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_code_of_the_users_own(launcher: str, cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """It is found beside a recipe that was given by a path from the folder of the submission."""
    write_own_recipe(tmp_path / "mine", shards)
    command = [
        str(Path(sys.executable).parent / "shardstep"), "submit", "mine/recipe.yaml", "train.duration=5 steps",
        "--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1", "--time", "5", "--launcher", launcher, "--follow",
    ]  # fmt: skip
    followed = cluster.sh(command, cwd=tmp_path, timeout_s=180)
    run = tmp_path / "mine" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["world_size"]) == ("finished", 5, 2), followed.stdout
    assert (run / "code" / "net.py").is_file()


def test_a_comparison_as_an_array(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """The same command twice: the first submits what is missing, the second finds it all and writes the answer."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    command = [
        str(Path(sys.executable).parent / "shardstep"), "compare", str(recipe), "--over", "optimizer.name=sgd,adam",
        "--seeds", "1", "--budget", "100 steps", "--out", "out", "--slurm", "--time 5 --cpus-per-rank 1 --follow",
    ]  # fmt: skip
    followed = cluster.sh(command, cwd=tmp_path, timeout_s=180).stdout
    assert "2 COMPLETED" in followed
    assert not (tmp_path / "out" / "results.json").exists()
    assert "out/results.json" in cluster.sh(command, cwd=tmp_path).stdout
    variants = json.loads((tmp_path / "out" / "results.json").read_text())["variants"]
    assert [(variant["name"], variant["runs"]["0"]["state"]) for variant in variants] == [
        ("sgd", "finished"),
        ("adam", "finished"),
    ]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_slurm_takes_what_submit_writes(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    options = {"partition": "spot", "comment": 'two words and "quotes" # and more'}
    script = render(world(launcher, options=options, gpus_per_node=2, folder=str(tmp_path)), ["smoke"])
    assert "to start at" in cluster.sh(["sbatch", "--test-only"], text=script).stderr
    refused = cluster.sh(
        ["sbatch", "--test-only"], text=script.replace("--partition=spot", "--partition=none"), check=False
    )
    assert "invalid partition" in refused.stderr


def test_gpus_that_were_asked_for_are_visible(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    job = world(
        "srun", nodes=1, gpus_per_node=2, setup=["srun bash -c 'echo \"GPUs $CUDA_VISIBLE_DEVICES\"'", "exit 0"]
    )
    submitted = submit(cluster, tmp_path, shards, job)
    assert submitted.end() == "COMPLETED", submitted.log()
    assert submitted.log() == "GPUs 0,1\nGPUs 0,1\n"


# --- faults, planted for the doctor -----------------------------------------------------------------------------------

_RANK = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=1 "
_RANK += "MASTER_ADDR=n1 MASTER_PORT=$((20000 + SLURM_JOB_ID)); "
FAULTS = {
    "none": (_RANK + "{doctor}", 0, ["2 of 2 ranks on 2 hosts", "nothing would break a run"]),
    "none, and no variables either": ("{doctor}", 0, ["2 of 2 ranks on 2 hosts", "nothing would break a run"]),
    "N worlds of one": ("env -u SLURM_STEP_NUM_TASKS {doctor}", 1, ["Slurm was asked for 2 tasks"]),
    "rank read too early": (
        _RANK.replace("$SLURM_PROCID", "0") + "{doctor} --timeout 20", 1, ["2 processes have rank 0"],
    ),
    "double launch": ("{torchrun} --nproc-per-node 1 {script}", 1, ["srun started 2 tasks"]),
    "recipes that differ": (
        _RANK + '[ "$SLURM_NODEID" = 0 ] || set -- optimizer.lr=0.5; {doctor} {recipe} "$@"', 1, ["rank 1", "recipe"],
    ),
    "versions that differ": (
        _RANK + '[ "$SLURM_NODEID" = 0 ] || export PYTHONPATH={other}; {doctor}', 1, ["webdataset", "9.9.9"],
    ),
    "an interface that is not there": (_RANK + "export GLOO_SOCKET_IFNAME=ib7; {doctor}", 1, ["no such interface"]),
    "a rank that does not come": (
        _RANK + '[ "$SLURM_PROCID" != 1 ] || exit 0; {doctor} --timeout 9', 1, ["rank 1 of 2 did not come"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def limited(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Two runs whose time is a minute, which passes while the doctor is at work: they leave it the processors.

    The one knows it, and saves in time; the other's limit is lowered behind its back. Neither gets a signal before
    Slurm's SIGTERM, with which the time is over.
    """
    job = world("torchrun", nodes=1, ranks_per_node=1, options={"signal": ""}, setup=["renice -n 19 $$ > /dev/null"])
    folder, endless = tmp_path_factory.mktemp("limited"), "train.duration=1000000 steps"
    unwarned = submit(cluster, folder / "unwarned", shards, job, endless)
    planning = submit(cluster, folder / "planning", shards, replace(job, time="1"), endless)
    unwarned.wait_step(0)
    cluster.sh(["scontrol", "update", f"JobId={unwarned.job}", "TimeLimit=1"])
    return {"planning": planning, "unwarned": unwarned}


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds(cluster: Cluster, limited: object, shards: Path, tmp_path: Path, fault: str) -> None:
    command, code, message = FAULTS[fault]
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    places = {
        "doctor": f"{sys.executable} -m shardstep.launch.doctor",
        "torchrun": str(Path(sys.executable).parent / "torchrun"),
        "script": str(ROOT / "launch" / "doctor.py"),
        "recipe": str(recipe),
        "other": str(tmp_path / "other"),  # where another version of a library is installed
    }
    (tmp_path / "other" / "webdataset-9.9.9.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "webdataset-9.9.9.dist-info" / "METADATA").write_text("Name: webdataset\nVersion: 9.9.9\n")
    for name, place in places.items():
        command = command.replace(f"{{{name}}}", place)
    srun = ["srun", "-N2", "-n2", "-t5", "bash", "-c", command]
    result = cluster.sh(srun, cwd=tmp_path, check=False, timeout_s=170)
    output = result.stdout + result.stderr
    assert (result.returncode != 0) == bool(code), output
    for words in message:
        assert words in " ".join(output.split()), output
    assert "Traceback" not in output or "torchrun" in command  # whose agents tell a failure in their way


def test_time_limits(cluster: Cluster, limited: dict[str, Submitted]) -> None:
    planning, unwarned = limited["planning"], limited["unwarned"]
    cluster.wait_restart(planning.job, 1)
    log = planning.log()
    assert re.search(r"the allocation ends in (60|[45]\d) s", log), log  # of one minute
    assert "stopped by the allocation's end: step" in log
    assert re.search(r"of the run is done; at this pace the rest takes [\d,]+ more jobs of 60 s", log), log
    cluster.sh(["scancel", planning.job])

    cluster.wait_restart(unwarned.job, 1, timeout_s=150)
    assert "stopped by SIGTERM" in unwarned.log()
    unwarned.wait_step(unwarned.summary()["step"])
    assert "resuming from" in unwarned.log()
    cluster.sh(["scancel", unwarned.job])


def test_scripts_by_hand(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """As a person would who does without `shardstep submit`."""
    recipe = write_recipe(tmp_path, shards, **SECTIONS)
    found = cluster.sh(
        ["sbatch", "--parsable", f"--output={tmp_path}/job.log", "--export=ALL,RANKS_PER_NODE=2,PYTHON=" + sys.executable,
         f"--chdir={ROOT}", "slurm/torchrun.sbatch", str(recipe), "train.duration=100 steps"], cwd=ROOT,
    )  # fmt: skip
    submitted = Submitted(cluster, found.stdout.strip(), tmp_path)
    assert submitted.end() == "COMPLETED", submitted.log()
    assert submitted.summary()["world_size"] == 2
    shutil.rmtree(ROOT / f"shardstep-{submitted.job}")  # the ranks' logs
