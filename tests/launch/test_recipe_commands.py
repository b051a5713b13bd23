"""`shardstep recipes`, `shardstep keys` and `shardstep train --show-config`: what they print, and that they start nothing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shardstep.configs import schema
from shardstep.configs.errors import InputError
from shardstep.configs.load import find_recipe, load_recipe, recipe_names
from shardstep.configs.resolve import choices_of
from shardstep.launch import keys, recipes, train
from shardstep.trainer.distributed.launch_env import environment_of_rank
from tests.runs import train_ranks, write_recipe


def test_every_recipe_is_listed_with_what_it_is_and_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == recipe_names()
    assert max(map(len, lines)) <= 80
    for name in recipe_names():
        what, result = recipes.read_head(find_recipe(name))
        assert what[0].isupper(), name
        assert len(what) > 20, name
        assert result.startswith("Not yet run") or (result.startswith("measured: ") and "; on " in result), name


def test_recipe_heads(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "# A net of 3.5 layers. More\n# on it.\n#\n#   shardstep train x\n#\n# 2 cores (AVX2), torch 2.15.0: 87 %\n"
        "# after 3 s: fast (n = 1). Other facts.\ndata: {source: digits}\n# no head\n"
    )
    assert recipes.read_head(path) == (
        "A net of 3.5 layers",
        "measured: 87 % after 3 s: fast (n = 1); on 2 cores (AVX2), torch 2.15.0",
    )


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for section in dataclasses.fields(schema.Recipe):
        names = ["name"] if section.name in schema.OPEN_SECTIONS else [f.name for f in dataclasses.fields(section.type)]  # type: ignore[arg-type]
        for name in names:
            assert f"\n  {section.name}.{name}: " in text
    assert "  data.mode: auto|resident|stream = auto\n      Where images are read from. resident: decoded once" in text
    assert "  data.resize: int or null = null\n" in text
    assert "  run.allow_changes: list of str = []\n" in text
    assert "  train.duration: str = 10 epochs\n" in text


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("train", ["  train.clip_norm: float or null = null\n"]),
        (
            "model",
            ["  model.name: str, required\n", "  mlp\n", "      hidden: list of int = [128, 64]\n", "torchvision/"],
        ),
        ("loss", ["  loss.name: str = cross_entropy\n", "      reduction: mean|sum = mean\n"]),
        (
            "optimizer",
            ["  sgd\n", "      betas: [float, float] = [0.9, 0.999]\n", "      fused: bool or null = null\n"],
        ),
        ("schedule", ["  step\n", "      every: str, required\n", "      warmup: str or null = null\n"]),
        ("average", ["  ema\n"]),
        ("augment", ["  translate\n", "      pixels: int = "]),
    ],
)
def test_keys_of_a_section(section: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main([section]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert not [part for part in told if part not in text], text


def test_an_unknown_section_is_reported_with_its_neighbours() -> None:
    with pytest.raises(InputError, match=r"^no section 'optimiser'; did you mean optimizer\?$"):
        keys.main(["optimiser"])


def test_recipes_and_keys_need_no_torch() -> None:
    code = (
        "import sys; from shardstep.launch import cli\n"
        "for name in ('recipes', 'keys'): sys.argv = ['shardstep', name]; cli.main()\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, list[str]]:
    """Return the recipe that --show-config prints, and its comments."""
    assert train.main([*arguments, "--show-config"]) == 0
    text = capsys.readouterr().out
    return yaml.safe_load(text), [line[2:] for line in text.splitlines() if line.startswith("# ")]


def test_show_config_resolves_what_needs_no_measurement(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, shards, data={"mode": "auto"}))
    before = sorted(tmp_path.rglob("*"))
    shown, comments = show(
        capsys, recipe, "optimizer.lr=0.25", "train.device=auto", "train.precision=auto", "train.global_batch_size=30",
        "train.max_micro_batch=8", "train.duration=2 epochs", "--nproc", "2",
    )  # fmt: skip
    assert shown["optimizer"]["lr"] == 0.25
    assert (shown["train"]["device"], shown["data"]["mode"], shown["train"]["precision"]) == ("cpu", "resident", "auto")
    # 30 samples on 2 ranks: 15 each, in micro-steps of 8 and 7; 101 samples are ceil(101 / 30) = 4 steps per epoch
    assert "batch      30 = 2 ranks x 2 micro-steps of at most 8" in comments
    assert "duration   2 epochs = 8 steps of ceil(101 / 30) = 4 per epoch" in comments
    assert comments[-1].startswith("chosen when the run starts, by the data or by measuring: train.precision")
    assert sorted(tmp_path.rglob("*")) == before


def test_show_config_knows_home_and_the_launcher(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(shards))
    for name, value in environment_of_rank(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    recipe = str(write_recipe(tmp_path, shards, data={"train": "~/train", "test": "~/test"}))
    _, comments = show(capsys, recipe, "train.global_batch_size=30", "train.duration=2 epochs")
    assert comments[0].startswith("batch      30 = 2 ranks x 1 micro-step")
    assert comments[1] == "duration   2 epochs = 8 steps of ceil(101 / 30) = 4 per epoch"


def test_show_config_gives_a_recipe_that_train_reads(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([str(write_recipe(tmp_path, shards)), "--show-config"])
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    loaded = load_recipe(str(tmp_path / "shown.yaml"))
    assert not loaded.problems
    assert loaded.recipe.data.train == str(shards / "train")


def test_show_config_takes_the_choices_of_the_run_it_would_resume(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)
    shown, comments = show(capsys, str(recipe), "train.precision=auto", "train.memory_format=auto")
    assert shown == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert len(comments) == 2  # batch and duration: nothing is left to choose


def test_show_config_without_data_names_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, comments = show(capsys, "quickstart", "train.world_size=4", "optimizer.name=adam")
    assert shown["data"]["mode"] == "auto"
    assert comments[0].startswith("optimizer.name=adam replaces sgd")
    assert comments[1:4] == [
        "batch      256 = 4 ranks x 1 micro-step of at most 64",
        "duration   4 epochs; steps per epoch = ceil(training samples / 256) need the data",
        "there are no shards in data/cifar10/train and data/cifar10/test",
    ]
    _, comments = show(capsys, "quickstart", "train.duration=7 steps")
    assert comments[1] == "duration   7 steps"
    _, comments = show(capsys, "whole_batch")
    assert comments[0].startswith("batch and duration need the number of training samples")
    assert not list(tmp_path.iterdir())


def test_show_config_reports_a_batch_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="below the number of ranks, 4"):
        train.main(["smoke", "train.global_batch_size=2", "--nproc", "4", "--show-config"])


def test_a_resolved_recipe_is_what_is_shown(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["train.precision=fp32", "train.memory_format=contiguous", "train.convolutions=direct"]
    train.main([str(write_recipe(tmp_path, shards)), *fixed, "--show-config"])
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown = load_recipe(str(tmp_path / "shown.yaml")).recipe
    assert "auto" not in choices_of(shown).values()
