"""What `shardstep submit` writes and refuses; none of it needs Slurm."""

import difflib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.launch.cli import run
from shardstep.launch.grid import file_name, points_of
from shardstep.launch.jobs.job_script import Job, render, sbatch_word
from shardstep.launch.submit import main, seconds_of

GOLDEN = Path(__file__).parent / "golden"
JOBS = {
    "torchrun": (Job("quickstart", 2, 4, "4:00:00", "torchrun", gpus_per_node=4, cpus_per_rank=3, folder="/home/ada"), ()),
    "accelerate": (
        Job(
            "quickstart", 2, 2, "60", "accelerate",
            setup=["module load cuda", "source /opt/env/bin/activate"], container=["apptainer", "exec", "image.sif"],
            options={"partition": "long", "constraint": "a100|h100", "mail-user": "ada@example.org"}, stop_before_s=300,
        ),
        (),
    ),
    "srun": (Job("a_b", 1, 2, "1-00", "srun", requeue=False, folder="/with 'quotes' and $spaces"), ()),
    "array": (
        Job("sweep", 1, 1, "30", array="0-1%1"),
        (["optimizer.name=sgd", "run.name=sweep-sgd"], ["optimizer.name=adam", "run.name=sweep-adam"]),
    ),
}  # fmt: skip
ARGUMENTS = ["quickstart", 'run.name=it\'s $(touch x) `y` "z"; rm -rf *', "train.duration=2 epochs"]


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_as_they_were(name: str) -> None:
    """After an intended change: SHARDSTEP_GOLDEN=write pytest tests/slurm/test_submit.py, and read the diff."""
    job, points = JOBS[name]
    check_golden(name, render(job, ARGUMENTS, points, "shardstep submit ..."))


def check_golden(name: str, script: str) -> None:
    """Compare a script with the golden file of this name, or write the file if the environment says so."""
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("SHARDSTEP_GOLDEN") == "write":
        path.write_text(script)
    before = path.read_text()
    difference = "".join(
        difflib.unified_diff(before.splitlines(True), script.splitlines(True), f"{path}", "what submit writes now")
    )
    assert not difference, f"\n{difference}"


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_complete_and_valid_bash(name: str) -> None:
    job, points = JOBS[name]
    script = render(job, ARGUMENTS, points)
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "slurm/job.sh\n" not in script
    assert script.count("--kill-on-bad-exit=1") == 1


HOSTILE = [
    "a b", "it's", 'say "hi"', "$(touch pwned)", "`touch pwned`", "; touch pwned #", "&& touch pwned", "* ? [a]", "\\",
    "{a,b}", "ü 漢", "-n", "~", "!history", "%j %x", "line\nbreak; touch pwned",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_reaches_the_program_as_it_is_and_does_nothing(text: str, tmp_path: Path) -> None:
    """The script's own arguments, printed by a stand-in for srun."""
    place = tmp_path / text.replace("\n", " ") / "here"
    place.mkdir(parents=True)
    job = Job(file_name(text), 1, 1, "10", folder=str(place), python=f"/{text}/python", log_folder="logs")
    script = render(job, [text, f"run.name={text}"], command=f"shardstep submit {shlex.join([text])}")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/bash\n[ "$2" = hostnames ] && echo n1\ntrue\n')
    # srun's arguments from the function's name on
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != task ]; do shift; done; shift; printf "%s\\0" "$PYTHON" "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    environment |= {"SLURM_JOB_NAME": job.name, "SLURM_JOB_NODELIST": "n1"}
    result = subprocess.run(["bash"], input=script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split("\n", 1)[1].split("\0")
    assert words == [f"/{text}/python", text, "train.world_size=1", f"run.name={text}", ""]
    assert not list(tmp_path.rglob("pwned"))
    assert all(line.count("\n") == 0 for line in script.splitlines() if line.startswith("#SBATCH"))


def test_words_of_sbatch_lines() -> None:
    assert sbatch_word("a100|h100&nvlink") == "a100|h100&nvlink"
    assert sbatch_word("two words") == '"two words"'
    assert sbatch_word('a "b" \\') == '"a \\"b\\" \\\\"'
    assert file_name("../it's a/run\n") == "it_s_a_run"
    assert file_name("漢") == "shardstep"


def test_points() -> None:
    assert points_of([]) == []
    assert points_of(["run.seed=0,1", "optimizer.name=sgd,adam"]) == [
        ["run.seed=0", "optimizer.name=sgd"], ["run.seed=0", "optimizer.name=adam"],
        ["run.seed=1", "optimizer.name=sgd"], ["run.seed=1", "optimizer.name=adam"],
    ]  # fmt: skip
    assert points_of(["data.augment=[flip,translate],[]"]) == [["data.augment=[flip,translate]"], ["data.augment=[]"]]
    with pytest.raises(InputError, match="not of the form section.key=value,value"):
        points_of(["lr=1,2"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:10", 5410), ("1-2", 93600), ("1-02:30", 95400), ("1-2:30:10", 95410)],
)
def test_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_options_become_directives(capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(
        capsys, "quickstart", "train.duration=3 steps", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00",
        "--partition", "gpu", "--account=lab", "--qos", "high", "--constraint", "a100", "--dependency", "afterok:12",
        "--mail", "ada@example.org", "--mem", "64G", "--sbatch", "gpu-bind=closest", "--sbatch", "comment=two words",
        "--sbatch", "exclusive",
    )  # fmt: skip
    found = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert found == {
        "job-name=quickstart", "nodes=2", "ntasks-per-node=1", "cpus-per-task=12", "gpus-per-node=4", "time=1:00:00",
        "signal=USR1@120", "open-mode=append", "output=logs/%x-%j.log", "requeue", "partition=gpu", "account=lab", "qos=high",
        "constraint=a100", "dependency=afterok:12", "mail-user=ada@example.org", "mail-type=END,FAIL,REQUEUE", "mem=64G",
        "gpu-bind=closest", 'comment="two words"', "exclusive",
    }  # fmt: skip
    assert f"PYTHON={sys.executable}" in script
    assert "set -- quickstart 'train.duration=3 steps'\n" in script


def test_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(capsys, "smoke", "--over", "optimizer.name=sgd,adam", "--time", "5", "--array", "0-1%1")
    assert "#SBATCH --array=0-1%1\n" in script
    assert '  1) set -- "$@" optimizer.name=adam run.name=smoke-adam ;;\n' in script
    script = dry_run(capsys, "smoke", "run.dir=runs/x", "--over", "optimizer.name=sgd,adam", "--time", "5")
    assert "#SBATCH --array=0-1\n" in script
    assert "optimizer.name=sgd run.dir=runs/x-sgd" in script
    script = dry_run(capsys, "smoke", "--array", "0-2", "--time", "5")  # alone: seeds
    assert '  2) set -- "$@" run.seed=2 run.name=smoke-2 ;;\n' in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nods", "2"], "--nods is not an option; did you mean --nodes"),
        (["--tmie", "2", "--partiton=x"], "--partition"),
        ([], "--time is required: the time limit of the job, such as 4:00:00"),
        (["--time", "soon"], "--time 'soon' is not minutes, mm:ss, h:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss"),
        (["--time", "3"], "--stop-before 120 s is more than half of --time 3: the job would hardly train"),
        (["--time", "0"], "is more than half of --time 0"),
        (["--time", "5", "--over", "train.global_batch_size=64,2", "--ranks-per-node", "4"], "global_batch_size=2 is below"),
        (["--time", "5", "--over", "run.seed=0,1", "--array", "0-5%2"], "--array 0-5%2, but --over has 2 points: 0 to 1"),
        (["--time", "5", "--nodes", "0"], "--nodes 0 must be 1 or more"),
        (["--time", "5", "--nodes", "x"], "argument --nodes: invalid int value: 'x'"),
        (["--time", "5", "--launcher", "mpirun"], "invalid choice: 'mpirun'"),
        (["--time", "5", "--gpus-per-node", "2", "--ranks-per-node", "3"], "ranks cannot share a GPU"),
        (["--time", "5", "--array", "x"], "--array 'x' is not of a form such as 0-5, 0,2,4 or 0-5%2"),
        (["--time", "5", "--sbatch", "--exclusive"], "--sbatch: expected one argument"),
        (["--time", "5", "--sbatch", "Exclusive yes"], "--sbatch 'Exclusive yes' is not of the form key or key=value"),
        (["--time", "5", "--container", "run 'my image'"], "must be plain words"),
        (["--time", "5", "--partition", "a\n#SBATCH --uid=0"], "contains a line break"),
        (["--time", "5", "--over", "lr=1"], "--over 'lr=1' is not of the form"),
        (["--time", "5", "--over", "optimizer.name=sgd,adm"], "optimizer.name=adm"),
        (["--time", "5", "optimizer.lrr=1"], "optimizer.lrr is not an option of adam; did you mean lr?"),
        (["--time", "5", "train.world_size=3", "--ranks-per-node", "2"], "train.world_size=3, but 1 x 2 ranks"),
        (["--time", "5", "train.global_batch_size=4", "--ranks-per-node", "8"], "below the number of ranks, 8"),
        (["--time", "5", "train.device=cuda"], "train.device=cuda needs --gpus-per-node"),
        (["--time", "5", "train.device=cpu", "--gpus-per-node", "1"], "would leave the GPUs"),
    ],
)  # fmt: skip
def test_bad_input_is_reported_and_nothing_is_submitted(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(main, ["smoke", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_without_slurm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardstep.launch.submit", "smoke", "--time", "5"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PATH": "/nonexistent"}
    )
    assert result.returncode == 2
    assert "there is no sbatch here" in result.stderr
