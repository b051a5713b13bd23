"""Which commands run on ranks: every other one is refused, in one line, where a launcher has started it several times."""

import os
from pathlib import Path
from unittest import mock

import pytest

from shardstep.launch import cli
from shardstep.launch.cli import COMMANDS, ON_RANKS
from tests.conftest import ROOT
from tests.distributed import BOTH_MPIS, free_port, mpi, run_command
from tests.launch.test_launch import BIN, start
from tests.trainer.distributed.test_launchers import MPICH, MVAPICH, OPEN_MPI, PLACED, SRUN, SUBMITIT, TORCHRUN

ONCE = [name for name in COMMANDS if name not in ON_RANKS]
LAUNCHES = {
    "open mpi": OPEN_MPI, "mpich": MPICH, "mvapich": MVAPICH, "submitit": SUBMITIT, "srun": SRUN, "torchrun": TORCHRUN,
    "by hand": PLACED, "mpich without a place": {"PMI_RANK": "0", "PMI_SIZE": "2"},
}  # fmt: skip
ALONE = {
    "no launcher": {},
    "torchrun, one rank": TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    "mpirun -n 1": {name: "1" if name.endswith("SIZE") else "0" for name in OPEN_MPI},
    "a batch script of Slurm": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "a rank that is left over": {"RANK": "3"},
    "a size that is none": {"RANK": "0", "WORLD_SIZE": "x"},
}


def outcome(name: str, launch: dict[str, str]) -> int:
    """The exit code of a command that does nothing, in a process with these variables."""
    with mock.patch.dict(os.environ, launch, clear=True):
        return cli.run(lambda _: 0, [], name)


@pytest.mark.parametrize("name", ONCE)
def test_a_command_that_runs_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for how, launch in ALONE.items():
        assert outcome(name, launch) == 0, how
    assert capsys.readouterr().err == ""
    for how, launch in LAUNCHES.items():
        assert outcome(name, launch) == 2, how
        told = capsys.readouterr().err
        has_launcher, is_first = how != "by hand", "0" in (launch.get("RANK"), launch.get("PMI_RANK"))
        assert told.count("\n") == (1 if is_first or not has_launcher else 0), how  # rank 0 prints for all
        if told:
            assert f"error: {name} does not run on ranks, and a launcher started 2 processes" in told, how


@pytest.mark.parametrize("name", ON_RANKS)
def test_a_command_that_runs_on_ranks(name: str) -> None:
    assert name in COMMANDS
    for how, launch in (ALONE | LAUNCHES).items():
        assert outcome(name, launch) == 0, how


@BOTH_MPIS
def test_mpirun_of_an_export(name: str, finished_run: Path, tmp_path: Path) -> None:
    command = [str(BIN / "shardstep"), "export", str(finished_run), "--format", "safetensors", "--out", "a.safetensors"]
    result = start(*mpi(name), "-n", "2", *command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: export does not run on ranks") == 1
    assert not list(tmp_path.iterdir())


def test_torchrun_of_a_report(finished_run: Path, tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "report.py")
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), script]
    result = start(*command, str(finished_run), "--out", "a.html", cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("error: report does not run on ranks") == 1
    assert not list(tmp_path.iterdir())


def test_two_exports_side_by_side(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ends while the other is writing: each has a partial file of its own."""
    from shardstep.launch.export import main
    from shardstep.trainer.analysis import export_formats

    arguments = [str(finished_run), "--format", "safetensors", "--out", str(tmp_path / "a.safetensors")]
    load = export_formats.FORMATS["safetensors"].load

    def load_after_the_other(path: Path) -> export_formats.Loaded:
        assert run_command("export", *arguments, cwd=tmp_path).returncode == 0
        return load(path)

    slow = export_formats.Format(
        ".safetensors", "torch", export_formats.FORMATS["safetensors"].write, load_after_the_other
    )
    monkeypatch.setitem(export_formats.FORMATS, "safetensors", slow)
    assert cli.run(main, arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
