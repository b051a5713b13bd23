"""The preflight, run for real: where nothing is wrong, and with faults that were planted."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S, free_port, run_command, run_ranks
from tests.own_code import write_code
from tests.runs import train_ranks, write_recipe

BIN = Path(sys.executable).parent
DOCTOR = str(ROOT / "launch" / "doctor.py")


def start(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=HANG_S
    )


def examine(arguments: list[str], environment: dict[str, str | None] | None = None) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank: exit code, the report, and stderr of `doctor --json`; in an environment, None taking away."""
    from shardstep.launch.cli import run
    from shardstep.launch.doctor import main

    for name, value in (environment or {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(main, [*arguments, "--json"])
    return code, json.loads(out.getvalue() or "{}"), err.getvalue()


def only(report: dict[str, Any]) -> dict[str, str]:
    """The one error of a report."""
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert len(errors) == report["errors"] == 1, report["findings"]
    assert errors[0]["cure"]
    return errors[0]


# --- nothing is wrong -------------------------------------------------------------------------------------------------


def test_alone(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    before = sorted(tmp_path.rglob("*"))
    result = run_command("doctor", str(recipe), "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    report = json.loads(result.stdout)
    assert report["errors"] == 0
    facts = report["facts"]
    assert (facts["data"]["train"]["samples"], facts["data"]["test"]["samples"]) == (101, 53)
    # 3 x 32 x 32 = 3072 inputs, 16 hidden, 10 classes: 3072 x 16 + 16 + 16 x 10 + 10 = 49,338
    assert facts["step"]["parameters"] == 49_338
    assert facts["step"]["samples"] == 30
    assert facts["threads"]["count"] == report["ranks"][0]["threads"]
    assert facts["step"]["checkpoint_bytes"] == 4 * 49_338  # float32; plain SGD has no state
    assert facts["disk"]["inodes"] is None or facts["disk"]["inodes"] > 0
    assert report["ranks"][0]["fp32_gflops"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_under_torchrun_one_rank_prints(tmp_path: Path) -> None:
    result = start(str(BIN / "torchrun"), "--nproc-per-node", "2", DOCTOR, "smoke", cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("nothing would break a run")
    assert len([line for line in lines if line.startswith("shardstep")]) == 1
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 25
    assert "\x1b" not in result.stdout
    assert [line.split()[0] for line in lines if line.endswith("MB/s")] == ["0", "1"]
    assert any(line.startswith("  step       32 samples") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_without_a_recipe_no_step_is_taken(tmp_path: Path) -> None:
    ((code, report, _),) = run_ranks(1, in_folder, str(tmp_path), [])
    assert code == 0
    assert report["facts"]["recipe"]["name"] == "quickstart"
    assert "step" not in report["facts"]


def in_folder(folder: str, arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank."""
    os.chdir(folder)
    return examine(arguments)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["nosuch"], ["--timeout", "0"], ["--timeout", "soon"], ["--nosuch"]])
def test_bad_arguments_end_with_2(arguments: list[str], tmp_path: Path) -> None:
    result = run_command("doctor", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# --- faults of one process --------------------------------------------------------------------------------------------


def examine_all(cases: list[list[str]]) -> list[tuple[int, dict[str, Any], str]]:
    """Runs in a rank: one report after another."""
    return [examine(arguments) for arguments in cases]


def test_faults_of_recipe_data_and_folder(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    shutil.copytree(shards / "train", tmp_path / "cut")
    manifest = tmp_path / "cut" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    cases = {
        "optimizer.lrr=1": ("recipe", "did you mean lr?"),
        "data.train=nowhere": ("data", "no shards in nowhere"),
        f"data.train={tmp_path / 'cut'}": ("data", "manifest.json is damaged"),
        "run.dir=/proc/run": ("disk", "no file can be created in /proc"),  # root cannot write there, either
        f"run.dir={tmp_path / 'file' / 'run'}": ("disk", "is a file"),
        f"run.dir={tmp_path / 'taken'}": ("run", "holds files that are not a run's"),
        "train.world_size=3": ("launch", "1 rank came up"),
        "train.device=cuda": ("device", "no CUDA device"),
        "train.global_batch_size=102": ("step", "more than the 101 training samples"),
        "data.normalize={mean: [0], std: [1.0e-38]}": ("step", "the loss of the first step is NaN or infinite"),
    }
    ((*reports,),) = run_ranks(1, examine_all, [[recipe, override] for override in cases])
    for (override, (check, what)), (code, report, _) in zip(cases.items(), reports, strict=True):
        finding = only(report)
        assert (code, finding["check"]) == (1, check), override
        assert what in finding["what"], override
        assert "step" not in report["facts"]


def examine_a_slow_step(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank."""
    from shardstep.trainer.doctor import probe

    def slow(*rest: Any) -> None:
        print("output of a library, which is not part of the report")
        time.sleep(9)

    probe.take_step = slow
    return examine(arguments)


def test_a_slow_step_of_one_rank_is_a_warning(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    ((code, report, _),) = run_ranks(1, examine_a_slow_step, [recipe, "--timeout", "8"])
    assert code == 0
    assert [finding["check"] for finding in report["findings"]] == ["step"]


def test_one_set_for_both_is_a_warning(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, data={"test": str(shards / "train")}))
    ((code, report, _),) = run_ranks(1, examine, [recipe])
    assert code == 0
    (found,) = (one for one in report["findings"] if one["check"] == "data")
    assert (found["severity"], found["what"]) == ("warning", "101 of 101 test images are also in the training set")
    assert "data.validation=0.1 data.test=none" in found["cure"]


def test_a_missing_compiler_is_a_warning(tmp_path: Path) -> None:
    result = start(sys.executable, DOCTOR, "--json", cwd=tmp_path, CC="no-such-compiler")
    assert result.returncode == 0, result.stdout
    (found,) = (one for one in json.loads(result.stdout)["findings"] if one["check"] == "compiler")
    assert found["severity"] == "warning"
    assert "no no-such-compiler" in found["what"]


def test_missing_data_that_can_be_written_are_no_error(tmp_path: Path) -> None:
    folders = [f"data.train={tmp_path}/a", f"data.test={tmp_path}/b"]
    ((code, report, _),) = run_ranks(1, examine, ["quickstart", "data.source=cifar10", *folders])
    assert code == 0
    assert report["facts"]["no_data"]["source"] == "cifar10"
    assert report["facts"]["no_step"] == "none was taken: its data do not exist yet"


ALONE: dict[str, str | None] = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


@pytest.mark.parametrize("task", ["0", "2"])
def test_worlds_of_one_under_slurm(task: str) -> None:
    variables = ALONE | {"SLURM_NTASKS": "4", "SLURM_PROCID": task}
    ((code, report, err),) = run_ranks(1, examine, ["smoke"], variables)
    assert code == 1
    if task != "0":  # one of the four prints
        assert (report, err) == ({}, "")
        return
    assert "4 separate runs" in only(report)["what"]


def test_a_rank_without_a_place() -> None:
    ((code, report, _),) = run_ranks(1, examine, ["smoke"], {"LOCAL_RANK": None, "MASTER_PORT": "soon"})
    assert code == 1
    assert only(report)["what"] == "RANK is set, but not LOCAL_RANK"


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RANK": ""}, "RANK=(empty): not a whole number"),
        ({"RANK": "x"}, "RANK=x: not a whole number"),
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS=(empty): not a whole number"),
        ({"SLURM_CPUS_PER_TASK": "x"}, "SLURM_CPUS_PER_TASK=x: not a whole number"),
        ({"MASTER_ADDR": "nosuch.invalid", "WORLD_SIZE": "2"}, "MASTER_ADDR=nosuch.invalid does not resolve on"),
        ({"ACCELERATE_USE_FSDP": "true"}, "Accelerate was set up for more than plain DDP"),
        (ALONE | {"PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto asks for several ranks"),
    ],
)
def test_environments_that_are_refused(environment: dict[str, str | None], what: str) -> None:
    ((code, report, _),) = run_ranks(1, examine, ["--timeout", "1"], environment)
    assert code == 1
    assert only(report)["what"].startswith(what)


def test_a_rank_that_never_comes_ends_the_waiting() -> None:
    began = time.monotonic()
    ((code, report, _),) = run_ranks(1, examine, ["smoke", "--timeout", "1"], {"WORLD_SIZE": "3"})
    assert code == 1
    assert only(report)["what"].startswith("ranks 1-2 of 3 did not come in 1 s; rank 0 did")
    assert time.monotonic() - began < 30


def test_a_first_rank_that_never_comes_is_reported_by_the_others() -> None:
    variables: dict[str, str | None] = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}
    ((code, report, err),) = run_ranks(1, examine, ["smoke", "--timeout", "1"], variables)
    assert (code, report) == (1, {})
    assert "rank 1 on" in err
    assert "could not reach the others at MASTER_ADDR=127.0.0.1" in err
    assert "fix: start rank 0" in err


# --- faults between ranks ---------------------------------------------------------------------------------------------


def examine_with_fault(fault: str, recipe: str) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank: something is wrong with rank 1."""
    from shardstep.trainer import machine
    from shardstep.trainer.distributed import world

    waits_s = "6" if fault in ("hang", "network", "death") else "30"  # those are waited for
    arguments, environment = [recipe, "--timeout", waits_s], {}
    if os.environ["RANK"] == "1":
        if fault == "recipe":
            arguments.append("optimizer.lr=0.06")
        elif fault == "no recipe":
            arguments[0] = "nosuch"
        elif fault in ("code", "broken code"):
            own = Path(recipe).parent
            for name in ("recipe.yaml", "net.py"):
                shutil.copy(own / name, own / "two" / name)
            added = "# changed" if fault == "code" else "import nothing_here"
            (own / "two" / "net.py").write_text((own / "net.py").read_text() + f"\n{added}\n")
            arguments[0] = str(own / "two" / "recipe.yaml")
        elif fault == "versions":
            versions = machine.versions() | {"webdataset": "0.2.100"}
            machine.versions = lambda: versions
        elif fault == "interface":
            environment = {"GLOO_SOCKET_IFNAME": "nosuch0"}
        elif fault == "rank":
            environment = {"RANK": "0"}
        elif fault == "hang":
            world.start_world = lambda config: time.sleep(14)
        elif fault == "unshared":
            socket.gethostname = lambda: "two"
            os.chdir("/")
        elif fault == "network":
            world.start_world = _fail
        elif fault == "death":
            world.start_world = lambda config: os._exit(0)
    return examine(arguments, environment)


def _fail(*arguments: Any) -> None:
    raise RuntimeError("no route to host\nand a stack")


@pytest.mark.parametrize(
    ("fault", "check", "what"),
    [
        ("recipe", "recipe", "the recipe differs: "),
        ("no recipe", "recipe", "rank 1: no recipe 'nosuch'"),
        ("versions", "versions", "webdataset differs: 1.0.2 on rank 0, 0.2.100 on rank 1"),
        ("interface", "network", "rank 1: GLOO_SOCKET_IFNAME=nosuch0, but there is no such interface"),
        ("code", "code", "net.py differs: "),
        ("broken code", "code", "rank 1: importing "),
        ("rank", "launch", "2 processes have rank 0"),
        ("network", "world", "rank 1: RuntimeError: no route to host"),
    ],
)
def test_faults_between_ranks(fault: str, check: str, what: str, shards: Path, tmp_path: Path) -> None:
    model = {"model": {"name": "net.py:net"}} if "code" in fault else {}
    recipe = str(write_recipe(tmp_path, shards, **model))
    for folder in (tmp_path, tmp_path / "two"):
        write_code(folder)
    reports = run_ranks(2, examine_with_fault, fault, recipe)
    assert [code for code, _, _ in reports] == [1, 1]
    spoken = [report for _, report, _ in reports if report]
    assert len(spoken) == 1
    finding = only(spoken[0])
    assert finding["check"] == check
    assert finding["what"].startswith(what)
    assert "step" not in spoken[0]["facts"]


def test_ranks_that_hang_are_reported_with_their_stack(shards: Path, tmp_path: Path) -> None:
    (code, report, _), _ = run_ranks(2, examine_with_fault, "hang", str(write_recipe(tmp_path, shards)))
    assert code == 1
    found = {finding["what"].split(":")[0]: finding["what"] for finding in report["findings"]}
    assert "not done after 6 s, now in" in found["rank 1"]
    assert "test_doctor.py" in found["rank 1"]
    assert "not done after 6 s, now in" in found["rank 0"]


def test_a_rank_that_dies_is_reported(tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); from tests.launch import test_doctor as t; t.die_or_report()"
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ROOT)],
            cwd=tmp_path,
            env=os.environ | variables | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    report = json.loads(ranks[0].communicate(timeout=HANG_S)[0])
    ranks[1].communicate(timeout=HANG_S)
    assert [rank.returncode for rank in ranks] == [1, 0]
    assert only(report)["what"] == "rank 1 died, or hung"


def die_or_report() -> None:
    """Runs in a separate process: rank 1 dies as the world comes up."""
    from shardstep.launch.cli import leave

    code, report, _ = examine_with_fault("death", "smoke")
    print(json.dumps(report))
    leave(code)


def test_hosts_that_do_not_share_the_folder_are_reported(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards, run={"dir": "run"}))  # beside where each rank stands
    (code, report, _), _ = run_ranks(2, examine_in, str(tmp_path), "unshared", recipe)
    assert code == 0, report["findings"]
    warnings = [finding["what"] for finding in report["findings"]]
    assert any(what.startswith("rank 1 cannot see what rank 0 writes in ") for what in warnings), warnings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def examine_in(folder: str, fault: str, recipe: str) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank."""
    os.chdir(folder)
    return examine_with_fault(fault, recipe)


def test_two_ranks_take_a_step_together(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    (code, report, _), (other_code, silent, _) = run_ranks(2, examine_with_fault, "none", recipe)
    assert (code, other_code, silent) == (0, 0, {})
    assert report["facts"]["step"]["samples"] == 30  # the global batch, half of it on each
    assert [row["rank"] for row in report["ranks"]] == [0, 1]
    assert all(row["all_reduce_mb_s"] > 0 for row in report["ranks"])
    assert not (tmp_path / "run").exists()


def examine_without_measuring(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """Runs in a rank, where a measurement of precisions fails."""
    from shardstep.trainer.formats import measurement

    measurement.measure = _fail
    return examine(arguments)


def test_the_step_keeps_the_choices_of_the_run_to_be_resumed(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    train_ranks(1, Path(recipe), "train.precision=bf16", "train.memory_format=channels_last")
    arguments = [recipe, "train.precision=auto", "train.memory_format=auto"]
    ((code, report, _),) = run_ranks(1, examine_without_measuring, arguments)
    assert code == 0, report["findings"]
    assert (report["facts"]["step"]["precision"], report["facts"]["step"]["memory_format"]) == ("bf16", "channels_last")
    assert report["facts"]["step"]["measured"] is None
    ((_, report, _),) = run_ranks(1, examine_without_measuring, [*arguments, "--measure"])
    assert report["facts"]["step"]["measured"].startswith("nothing to measure: the recipe, the run to be resumed or")
    ((_, report, _),) = run_ranks(1, examine_without_measuring, [*arguments, f"run.dir={tmp_path / 'new'}"])
    assert only(report)["check"] == "step"  # a new run measures


def test_a_recipe_without_a_test_set(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data={"test": "none", "validation": 0.2})
    result = run_command("doctor", str(recipe), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "data       101 images 32x32x3 in 10 classes, resident;" in result.stdout
