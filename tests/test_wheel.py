"""The wheel has everything: installed without the clone, it trains, compiles its C, writes job scripts and pages."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S

pytestmark = pytest.mark.drill
OF_THE_CLONE = ("Makefile", "README.md", "docs", "findings", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files that git knows, so that a build here leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            path.write_bytes((ROOT / name).read_bytes())
    build = ["wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=folder / "source", check=True, timeout=HANG_S)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel, which sees the libraries of this one, but not its shardstep."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=HANG_S)
    # Their .pth files are not read, so an editable shardstep is not found through them.
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in sys.path if Path(path).name == "site-packages"))
    return folder / "bin"


def run(environment: Path, *words: str, cwd: Path) -> str:
    """Run a program of the environment outside the clone; returns its stdout."""
    kept: dict[str, Any] = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept |= {"PATH": f"{environment}:{os.environ['PATH']}", "SHARDSTEP_CACHE": str(cwd / "cache")}
    result = subprocess.run(
        [str(environment / words[0]), *words[1:]], cwd=cwd, env=kept, capture_output=True, text=True, timeout=HANG_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = ("configs", "datasets", "launch", "slurm", "trainer")
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    root = "launch/package/"
    assert packed == {f"shardstep/{name.removeprefix(root)}" for name in listed.splitlines()}


def test_the_installed_package_is_the_wheels(environment: Path, tmp_path: Path) -> None:
    code = "import shardstep, shardstep.datasets.order as order; print(shardstep.__file__, order.__file__, shardstep.train)"
    found = run(environment, "python", "-c", code, cwd=tmp_path)
    assert found.count(str(environment.parent)) == 2
    assert str(ROOT) not in found


def test_commands_of_the_wheel_work_outside_the_clone(environment: Path, tmp_path: Path) -> None:
    assert "done: test accuracy" in run(environment, "shardstep", "train", "smoke", cwd=tmp_path)
    assert "quickstart" in run(environment, "shardstep", "recipes", cwd=tmp_path)
    run(environment, "shardstep", "report", "runs/smoke", cwd=tmp_path)
    assert "prefers-color-scheme" in (tmp_path / "runs" / "smoke" / "report.html").read_text()  # style.css is in it
    submit = ("submit", "quickstart", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--dry-run")
    assert "srun --nodes" in run(environment, "shardstep", *submit, cwd=tmp_path)


def test_the_wheel_compiles_its_kernels(environment: Path, tmp_path: Path) -> None:
    overrides = ("model.name=article_cnn", "train.convolutions=winograd", "train.duration=2 steps")
    text = run(environment, "shardstep", "train", "smoke", *overrides, "--nproc", "2", cwd=tmp_path)
    assert "world      2 ranks" in text
    assert list((tmp_path / "cache").rglob("*winograd*.so")), list((tmp_path / "cache").rglob("*"))


def test_the_wheel_is_used_from_python(environment: Path, tmp_path: Path) -> None:
    code = "import shardstep; run = shardstep.train('smoke', 'train.duration=2 steps'); print(run); shardstep.evaluate(run)"
    assert "<run runs/smoke: finished, step 2, " in run(environment, "python", "-c", code, cwd=tmp_path)
