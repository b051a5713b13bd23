"""The commands as a user starts them: python, torchrun, accelerate launch, with 1 and 2 processes."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shardstep.configs.load import load_recipe, recipe_names
from shardstep.datasets.manifest import open_shards
from shardstep.launch import cli
from shardstep.launch.shards import main as shards_main
from shardstep.trainer.validate_recipe import validate_recipe
from tests.conftest import ROOT
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar
from tests.distributed import HANG_S, run_command, run_ranks
from tests.runs import spoil_weights, train_lines, train_ranks, write_recipe

BIN = Path(sys.executable).parent
TRAIN = str(ROOT / "launch" / "train.py")
ACCELERATE = [
    str(BIN / "accelerate"),
    "launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def start(*command: str, cwd: Path, timeout_s: float = HANG_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)


FORMS = {
    "shardstep": [str(BIN / "shardstep"), "train"],
    "python": [sys.executable, TRAIN],
    "nproc 2": [str(BIN / "shardstep"), "train", "--nproc", "2"],
    "torchrun 1": [str(BIN / "torchrun"), "--nproc-per-node", "1", TRAIN],
    "torchrun 2": [str(BIN / "torchrun"), "--nproc-per-node", "2", TRAIN],
    "accelerate 1": [*ACCELERATE, "--num_processes", "1", "--cpu", TRAIN],
    "accelerate 2": [*ACCELERATE, "--num_processes", "2", "--multi_gpu", TRAIN],
}


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("reference")
    result = start(*FORMS["shardstep"], str(write_recipe(folder, shards)), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "done: test accuracy" in result.stdout
    return [line["loss"] for line in train_lines(folder / "run")]


RARE_FORMS = ["torchrun 1", "accelerate 1"]


@pytest.mark.parametrize(
    "form",
    [
        *(form for form in FORMS if form not in ("shardstep", *RARE_FORMS)),
        *(pytest.param(form, marks=pytest.mark.drill) for form in RARE_FORMS),
    ],
)
def test_every_way_to_start_trains_the_same(form: str, reference: list[float], shards: Path, tmp_path: Path) -> None:
    result = start(*FORMS[form], str(write_recipe(tmp_path, shards)), "train.device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in train_lines(tmp_path / "run")]
    assert losses == pytest.approx(reference, rel=1e-5)
    ranks = 2 if form.endswith("2") else 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == ranks
    assert result.stdout.count("done: test accuracy") == 1  # one rank prints


def test_accelerate_cpu_with_two_processes_is_caught(shards: Path, tmp_path: Path) -> None:
    result = start(
        *ACCELERATE, "--cpu", "--num_processes", "2", TRAIN, str(write_recipe(tmp_path, shards)), cwd=tmp_path
    )
    assert result.returncode != 0
    assert "starts only one process" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("output", "reason"), [(">/dev/full", "No space left on device"), ("| true", "Broken pipe")])
def test_training_continues_when_stdout_cannot_be_written(
    output: str, reason: str, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    command = f"set -o pipefail; {shlex.quote(str(BIN / 'shardstep'))} train {shlex.quote(str(recipe))} {output}"
    result = start("bash", "-c", command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"standard output cannot be written, training continues without: {reason}") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_bad_input_exits_with_2_and_one_message(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    result = start(*FORMS["python"], str(recipe), "optimizer.lrr=1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"error: recipe {recipe}: optimizer.lrr is not an option of sgd; did you mean lr?\n"


def test_evaluate_prints_one_object_last(shards: Path, tmp_path: Path, reference: list[float]) -> None:
    recipe = write_recipe(tmp_path, shards)
    assert run_command("train", str(recipe), cwd=tmp_path).returncode == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    results = [
        start(str(BIN / "shardstep"), "evaluate", str(tmp_path / "run"), cwd=tmp_path),
        start(
            str(BIN / "torchrun"),
            "--nproc-per-node",
            "2",
            str(ROOT / "launch" / "evaluate.py"),
            str(tmp_path / "run" / "checkpoints" / "step-00000008"),
            "--data",
            str(shards / "test"),
            "--device",
            "cpu",
            cwd=tmp_path,
        ),
    ]
    for world_size, result in enumerate(results, 1):
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert found == pytest.approx(summary["eval"] | {"samples": 53, "world_size": world_size}, rel=1e-6)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "recipe.yaml").unlink()
    result = run_command("evaluate", "../run", "--data", str(shards / "test"), cwd=elsewhere)
    assert json.loads(result.stdout.splitlines()[-1])["samples"] == 53
    flip_a_bit(tmp_path / "run" / "model.safetensors")
    result = run_command("evaluate", str(tmp_path / "run"), cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "model.safetensors is damaged: its sha256 is not that in the summary" in result.stderr
    (tmp_path / "run" / "summary.json").unlink()
    result = run_command("evaluate", str(tmp_path / "run"), cwd=tmp_path)
    assert "is not finished: using its checkpoint step-" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["accuracy"] == found["accuracy"]
    for path in (tmp_path, tmp_path / "nowhere"):
        result = run_command("evaluate", str(path), cwd=tmp_path)
        assert result.returncode == 2
        assert "neither a run's folder nor a checkpoint" in result.stderr


@pytest.mark.parametrize(("trained", "given"), [("colour", "grey"), ("grey", "colour")])
def test_images_of_another_mode_than_the_model_was_trained_on(trained: str, given: str, tmp_path: Path) -> None:
    for mode in (trained, given):
        for name in ("ape", "bee"):
            folder = tmp_path / f"{mode}-images" / name
            folder.mkdir(parents=True)
            shape = (8, 8, 3) if mode == "colour" else (8, 8)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        for split in ("train", "test"):
            write = ["shards", "write", "--source", f"{mode}-images", "--out", f"{mode}/{split}"]
            assert run_command(*write, cwd=tmp_path).returncode == 0
    train_ranks(1, write_recipe(tmp_path, tmp_path / trained, train={"duration": "1 steps", "global_batch_size": 8}))
    words = {"colour": "in colour", "grey": "grey"}
    note = f"the test images are {words[given]}; they are read {words[trained]}, like the training images"
    for command in (["evaluate", "run"], ["export", "run", "--format", "safetensors"]):
        assert note in run_command(*command, "--data", f"{given}/test", cwd=tmp_path).stdout.splitlines()
        assert note not in run_command(*command, "--data", f"{trained}/test", cwd=tmp_path).stdout


def test_a_nan_loss_is_null(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    spoil_weights(run, "head.weight")
    result = run_command("evaluate", str(run), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '"loss": null' in result.stdout.splitlines()[-1]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_shards_commands(tmp_path: Path) -> None:
    def shards(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command("shards", *arguments, cwd=tmp_path)

    result = shards(
        "write", "--source", "synthetic:25", "--split", "train", "--out", "set", "--samples-per-shard", "10"
    )
    assert result.returncode == 0, result.stderr
    assert "25 images in 3 shards" in result.stdout
    assert shards("verify", "set").stdout == "set: every byte is as it was written\n"
    assert "class3" in shards("info", "set").stdout
    order = shards("order", "set", "--seed", "1", "--epoch", "2", "--start", "20", "--count", "5").stdout.splitlines()
    assert [line.split()[0] for line in order] == ["20", "21", "22", "23", "24"]
    epoch = shards("order", "set", "--seed", "1", "--epoch", "2").stdout.splitlines()
    assert epoch[20:] == order
    assert sorted(line.split()[1] for line in epoch) == [f"{number:06d}" for number in range(25)]
    result = shards("order", "set", "--start", "20", "--count", "6")
    assert result.returncode == 2
    assert "are outside an epoch of 25 samples" in result.stderr
    (tmp_path / "set" / "train-000001.tar").unlink()
    result = shards("verify", "set")
    assert result.returncode == 2
    assert result.stderr == "error: set has changed since it was written: train-000001.tar is missing\n"
    assert shards("index", "set").returncode == 2  # the manifest is what the shards can be checked against
    assert shards("index", "set", "--force").returncode == 0
    assert "15 in 2 shards" in shards("info", "set").stdout
    assert "class3" in shards("info", "set").stdout  # names are kept
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("class3", "class4"))
    result = shards("index", "set", "--force")
    assert result.returncode == 0
    assert "manifest.json is damaged: its class names are lost" in result.stderr
    assert "class" not in shards("info", "set").stdout.partition("\nclasses")[2]


def test_a_full_disk_is_reported_with_the_folder_which_stays_as_it_was(tmp_path: Path) -> None:
    code = (  # no file may have more than 20,000 bytes
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from shardstep.launch import cli; sys.argv = ['shardstep', *sys.argv[1:]]; sys.exit(cli.main())"
    )
    arguments = ["shards", "write", "--source", "synthetic:200", "--out", "set"]
    result = start(sys.executable, "-c", code, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"failed: {tmp_path / 'set'}: File too large"
    assert not list(tmp_path.iterdir())


def test_class_names_that_do_not_fit_are_dropped_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard, options, warning in (
        ("a", ["--classes", "cat"], ""),
        ("b", [], "the class names of the old manifest do not fit; they were not kept"),
        ("c", [], ""),  # numbering continues
    ):
        write_tar(
            tmp_path / f"{shard}.tar", {f"{shard}.png": png(1), f"{shard}.cls": str(ord(shard) - ord("a")).encode()}
        )
        assert shards_main(["index", str(tmp_path), "--force", *options]) == 0
        lines = capsys.readouterr().err
        assert warning in lines if warning else lines == ""
    assert open_shards(tmp_path).manifest.classes == ["0", "1", "2"]


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; from shardstep.launch import cli; sys.argv = ['shardstep', '--help']; cli.main();"
        "print([name for name in ('torch', 'matplotlib', 'wandb', 'torchvision', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_checkpoints_are_listed_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from shardstep.launch import cli; sys.argv = ['shardstep', 'checkpoints', 'list', sys.argv[1]];"
        "print(cli.main(), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "there is no checkpoint in" in result.stderr
    assert result.stdout == "2 False\n"


def test_out_of_memory_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for empty, reason in ((torch.empty, "can't allocate memory"), (np.empty, "Unable to allocate")):
        assert cli.run(lambda _, empty=empty: len(empty(1 << 50)), []) == 1
        message = capsys.readouterr().err
        assert message.startswith("failed: ")
        assert reason in message
        assert "a smaller train.max_micro_batch" in message


def test_an_unknown_command_is_reported_with_its_neighbours() -> None:
    result = subprocess.run([BIN / "shardstep", "trian"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean train?" in result.stderr


def test_training_imports_only_what_it_uses(shards: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from shardstep.launch.train import main; main(sys.argv[1:]);"
        "print([name for name in ('wandb', 'torchmetrics', 'sklearn', 'tensorboard', 'webdataset') if name in sys.modules])"
    )
    result = start(sys.executable, "-c", code, str(write_recipe(tmp_path, shards)), cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "[]"


def test_missing_shards_are_made_before_training(tmp_path: Path) -> None:
    result = start(*FORMS["torchrun 2"], "smoke", "data.source=synthetic:70", "train.duration=1 epochs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "data" / "synthetic").iterdir() if path.is_dir()) == [
        "test",
        "train",
    ]


def test_shards_of_another_source_are_reported(shards: Path, tmp_path: Path) -> None:
    data = [f"data.train={shards}/train", f"data.test={shards}/test", "train.duration=1 steps"]
    result = run_command("train", "smoke", "data.source=synthetic:101", *data, cwd=tmp_path)
    assert f"shards     {shards}/train, {shards}/test" in result.stdout
    assert f"data.source=synthetic:101 is not used: {shards}/test already holds shards of other images" in result.stderr
    (tmp_path / "mine" / "train" / "a").mkdir(parents=True)
    for source, is_reported in {"cifar10": True, "digits": True, "mine": True, "null": False}.items():
        result = run_command("train", "smoke", f"data.source={source}", *data, f"run.name={source}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (f"data.source={source} is not used: {shards}/train already holds" in result.stderr) == is_reported


def train_two_steps(names: list[str], shards: str, folder: str) -> list[int]:
    """Runs in a rank: each recipe on small data, in one process; returns the steps that were taken."""
    from accelerate.state import AcceleratorState

    from shardstep.launch import train
    from shardstep.trainer import finish

    finish.leave_world = lambda accelerator: None  # the world stays up for the next recipe
    data = [f"data.train={shards}/train", f"data.test={shards}/test"]
    steps = []
    for name in names:
        AcceleratorState._reset_state()
        place = Path(folder) / name
        code = train.main([name, *data, f"run.dir={place}", "train.duration=2 steps", "train.global_batch_size=16"])
        assert code == 0, name
        steps.append(json.loads((place / "summary.json").read_text())["step"])
    return steps


LARGE_RECIPES = ["resnet18"]  # 20 s of CPU time
TWINS = ["article_adadelta", "article_adagrad", "article_momentum", "article_rmsprop", "article_sgd"]
"""Recipes that are article_adam with another optimizer."""


def test_every_recipe_runs_two_steps(shards: Path, tmp_path: Path) -> None:
    names = [name for name in recipe_names() if name not in ("inception", *LARGE_RECIPES, *TWINS)]
    assert run_ranks(1, train_two_steps, names, str(shards), str(tmp_path)) == [[2] * len(names)]
    validate_recipe(load_recipe("inception"))  # its weights would be downloaded


@pytest.mark.drill
def test_large_recipes_run_two_steps(shards: Path, tmp_path: Path) -> None:
    names = [*LARGE_RECIPES, *TWINS]
    assert run_ranks(1, train_two_steps, names, str(shards), str(tmp_path)) == [[2] * len(names)]


def test_real_images(cifar10_source: Path, tmp_path: Path) -> None:
    """CIFAR-10's test images from their source to shards, and an epoch of learning on them; test_drills.py takes them all."""
    result = run_command("shards", "write", "--source", "cifar10", "--split", "test", "--out", "test", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "test" / "manifest.json").read_text())
    # as published of the training images
    assert manifest["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)
    assert manifest["std"] == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-3)
    (tmp_path / "train").symlink_to("test")
    train_ranks(1, write_recipe(tmp_path, tmp_path, train={"duration": "1 epochs"}, log={"every": "100 steps"}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["test_samples"] == 10_000
    assert summary["eval"]["accuracy"] > 0.2  # guessing gives 0.1
