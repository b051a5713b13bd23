"""What a run leaves behind, how it fails, and how it resumes."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardstep.launch.comparison.results import read_result
from shardstep.trainer.monitoring.wandb_tracker import logged_steps, read_records
from shardstep.trainer.run_dir import find_weights
from tests.distributed import HANG_S, run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, train_until, write_recipe


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on one rank. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    train_ranks(1, write_recipe(folder, shards, log={"every": "2 steps"}), pictures=True)
    return folder / "run"


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "train_manifest.json",
        "metrics.jsonl",
        "summary.json",
        "starts.json",
        "checkpoints",
        "model.safetensors",
        "curves.png",
        "confusion.png",
        "predictions.png",
    }
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-00000004", "step-00000008"]
    for name in ("curves.png", "confusion.png", "predictions.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_metrics(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2),
        ("train", 4),
        ("eval", 4),
        ("train", 6),
        ("train", 8),
        ("eval", 8),
    ]
    assert [line["samples"] for line in lines] == [60, 101, 101, 161, 202, 202]  # 30 + 30, + 30 + 11, ...
    assert [line["epoch"] for line in lines] == pytest.approx([60 / 101, 1, 1, 1 + 60 / 101, 2, 2], abs=1e-6)
    for line in lines:
        assert {"loss", "accuracy", "lr"} <= set(line)
    assert {"samples_per_s", "data_wait_share"} <= set(lines[0])
    assert len(lines[2]["per_class_accuracy"]) == 10


def test_summary(finished: Path) -> None:
    summary, last = json.loads((finished / "summary.json").read_text()), read_lines(finished / "metrics.jsonl")[-1]
    assert summary["status"] == "finished"
    assert (summary["step"], summary["samples"], summary["world_size"], summary["restarts"]) == (8, 202, 1, 0)
    assert (summary["device"], summary["precision"]) == ("cpu", "fp32")
    assert summary["eval"] == {key: last[key] for key in ("loss", "accuracy", "top5")}
    assert summary["data"]["mode"] == "resident"
    assert summary["data"]["source"] == "synthetic:101"
    assert (summary["data"]["train_samples"], summary["data"]["test_samples"]) == (101, 53)
    assert len(summary["data"]["fingerprint"]) == 64
    assert summary["wall_s"] > 0


def test_the_same_seed_gives_the_same_weights(finished: Path, shards: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train_ranks(1, write_recipe(tmp_path, shards))
    first, second = load_file(finished / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    train_ranks(1, write_recipe(tmp_path / "other", shards, run={"seed": 1, "dir": str(tmp_path / "other" / "run")}))
    other = load_file(tmp_path / "other" / "run" / "model.safetensors")
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_gradient_is_that_of_the_global_mean(shards: Path, tmp_path: Path) -> None:
    """One step of SGD with lr 1 moves the weights by the gradient: compare with plain torch on the same samples."""
    from safetensors.torch import load_file

    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.order import EpochOrder
    from shardstep.datasets.reader import StreamReader
    from shardstep.trainer.models.mlp import mlp

    opened = open_shards(shards / "train")
    pixels, labels = StreamReader(opened).read(EpochOrder(opened.samples_per_shard, 0, 0).slice(0, 31))
    images = ((pixels / 255 - torch.tensor(opened.manifest.mean)) / torch.tensor(opened.manifest.std)).permute(
        0, 3, 1, 2
    )
    torch.manual_seed(0)
    reference = mlp((3, 32, 32), 10, hidden=(16,))
    torch.nn.functional.cross_entropy(reference(images), labels).backward()

    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        train_ranks(
            world_size,
            write_recipe(
                folder,
                shards,
                optimizer={"name": "sgd", "lr": 1.0},
                train={"global_batch_size": 31, "max_micro_batch": 4, "duration": "1 steps"},
            ),
        )
        trained = load_file(folder / "run" / "model.safetensors")
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(trained[name], parameter.detach() - parameter.grad, atol=1e-6), (world_size, name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_fractional_epochs_and_steps(shards: Path, tmp_path: Path, world_size: int) -> None:
    # 1.5 epochs of 101 samples = 151.5: steps of 30, 30, 30, 11 | 30, 30 -> 161 is the first boundary past it
    train_ranks(
        world_size,
        write_recipe(tmp_path, shards),
        "train.duration=1.5 epochs",
        "eval.every=0.5 epochs",
        "checkpoint.every=100 epochs",
        "checkpoint.keep=1",
    )
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["samples"] == 161
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4, 6]  # at or past 0.5, 1 and 1.5 epochs
    assert "step-00000006" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


def test_fp16_on_a_cpu_trains_with_a_scaler(shards: Path, tmp_path: Path) -> None:
    for clip in ("train.clip_norm=1.0", "run.seed=0"):
        folder = tmp_path / clip[:8]
        train_ranks(2, write_recipe(folder, shards), "train.precision=fp16", "train.duration=6 epochs", clip)
        lines = train_lines(folder / "run")
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert json.loads((folder / "run" / "summary.json").read_text())["precision"] == "fp16"
        state = json.loads((folder / "run" / "checkpoints" / "step-00000024" / "state.json").read_text())
        assert state["scaler"]["scale"] > 0


def test_fp16_on_a_cpu_is_warned_of(shards: Path, tmp_path: Path) -> None:
    ((code, _, message),) = run_ranks(1, failure_of, str(write_recipe(tmp_path, shards)), "train.precision=fp16")
    assert code == 0
    assert "warning: train.precision=fp16 on a CPU" in message


def test_no_checkpoint_is_saved_after_the_loss_left_the_numbers(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, optimizer={"name": "sgd", "lr": 1e20})
    overrides = ["log.every=100 steps", "eval.every=100 steps", "checkpoint.every=2 steps", "train.duration=10 epochs"]
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), *overrides)
    assert code == 1
    assert "was NaN or infinite" in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_nan_loss_is_reported(shards: Path, tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path, shards, log={"every": "100 steps"}), tmp_path / "log"
    ((code, _, message),) = run_ranks(1, with_a_bad_step, str(recipe), "checkpoint.every=100 steps")
    assert code == 1
    assert "NaN or infinite at step 4 (lr 0.05): the training loss since the last evaluation is nan. Try" in message
    assert "test loss" not in message
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] > 0
    log.write_text(message)
    assert read_result(tmp_path / "run", log).state == "failed"
    assert read_result(tmp_path / "run", log).has_diverged  # so compare does not run it again


def with_a_bad_step(recipe: str, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: the training loss of the second step is NaN, and the weights stay what they are."""
    from shardstep.trainer import loop

    step_function = loop.train_step

    def step(run: Any, batch: Any) -> Any:
        sums = step_function(run, batch)
        return sums * float("nan") if run.state.progress.step == 1 else sums

    loop.train_step = step
    return failure_of(recipe, *overrides)


def test_bf16_computes_in_bf16(shards: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        train_ranks(1, write_recipe(tmp_path / precision, shards), f"train.precision={precision}")
        losses[precision] = [line["loss"] for line in train_lines(tmp_path / precision / "run")]
    assert losses["fp32"] != losses["bf16"]
    assert losses["fp32"] == pytest.approx(losses["bf16"], rel=0.02)


def test_a_loss_that_leaves_the_numbers_is_a_failure_that_names_the_step(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, optimizer={"name": "sgd", "lr": 1e20})
    first, second = run_ranks(2, failure_of, str(recipe))
    assert first[0] == second[0] == 1
    assert "failed: the loss is" in first[2]
    assert "lr 1e+20" in first[2]
    assert "lower optimizer.lr" in first[2]
    assert second[2] == ""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("sections", "overrides", "expected"),
    [
        ({}, ["train.global_batch_size=1"], "train.global_batch_size=1 is below the number of ranks, 2"),
        ({}, ["train.global_batch_size=102"], "train.global_batch_size=102 is more than the 101 training samples"),
        ({}, ["train.world_size=3"], "train.world_size=3, but 2 ranks came up"),
        ({}, ["data.train=/nowhere"], "no shards in /nowhere"),
        ({}, ["loss.name=nll"], "takes log-probabilities"),
        ({}, ["data.augment=[{name: translate, pixels: 40}]"], "needs images of at least 41 pixels"),
        ({}, ["data.augment=[{name: blur, kernel_size: 65}]"], "needs images of at least 33 pixels"),
        ({}, ["data.augment=[{name: random_crop, padding: 1000000}]"], "needs images of at least 1000000 pixels"),
        (
            {},
            ["data.augment=[{name: random_crop, padding: 32, padding_mode: reflect}]"],
            "needs images of at least 33 pixels",
        ),
        ({"model": {"name": "article_cnn"}}, ["data.resize=7"], "images of 7x7 pixels are too small, it needs 9x9"),
        ({}, ["data.normalize={mean: [0.5], std: [0.2]}", "model.negative_slope=0.3"], "negative_slope belongs to"),
        ({}, ["run.resume=must"], "run.resume=must, but there is no checkpoint"),
        ({"optimizer": {"name": "muon", "lr": 0.1}}, [], "optimizer.name=muon"),
    ],
)
def test_bad_input_is_one_message_from_rank_0(
    shards: Path, tmp_path: Path, sections: dict, overrides: list[str], expected: str
) -> None:
    recipe = write_recipe(tmp_path, shards, **sections)
    (code, _, message), (other_code, _, silence) = run_ranks(2, failure_of, str(recipe), *overrides)
    assert (code, other_code) == (2, 2)
    assert expected in message
    assert "Traceback" not in message
    assert "error" not in silence


def test_test_set_of_another_task(shards: Path, tmp_path: Path) -> None:
    from shardstep.datasets.write import write_shards

    write_shards("digits", "test", tmp_path / "digits")
    recipe = write_recipe(tmp_path, shards)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), f"data.test={tmp_path / 'digits'}")
    assert code == 2
    assert "have different classes" in message


def test_test_set_that_lacks_a_class(shards: Path, tmp_path: Path) -> None:
    """Images of one class: they need the list of all, and then there is a test set of them."""
    from shardstep.datasets.write import write_shards

    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images" / "class3").mkdir(parents=True)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / "images" / "class3" / f"{number}.png")
    recipe = write_recipe(tmp_path, shards, train={"duration": "1 steps"})
    write_shards(str(tmp_path / "images"), "test", tmp_path / "one")
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), f"data.test={tmp_path / 'one'}")
    assert (code, "`shards write --classes-of` gives a set the classes of another" in message) == (2, True)
    write_shards(str(tmp_path / "images"), "test", tmp_path / "all", classes_of=shards / "train")
    train_ranks(1, recipe, f"data.test={tmp_path / 'all'}")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["test_samples"] == 6


def test_a_damaged_sample_stops_training_and_is_reported(shards: Path, tmp_path: Path) -> None:
    import shutil

    from shardstep.datasets.manifest import open_shards

    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    entry = open_shards(folder / "train").index[40]
    path = folder / "train" / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[int(entry["block"]) * 512 + 50] ^= 1
    path.write_bytes(data)
    for mode in ("stream", "resident"):
        recipe = write_recipe(tmp_path / mode, folder)
        ((code, _, message),) = run_ranks(1, without_cache, str(tmp_path / "cache"), str(recipe), f"data.mode={mode}")
        assert code == 2
        assert "train-000002.tar: sample 000040 is damaged" in message


def without_cache(folder: str, *arguments: str) -> tuple[int, str, str]:
    """Runs in a rank: like failure_of, where no earlier run has decoded the same data while it was intact."""
    import os

    os.environ["SHARDSTEP_CACHE"] = folder
    return failure_of(*arguments)


# --- second runs ------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)

    def content() -> dict[Path, bytes]:  # but for the lock, which says who holds it
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in files}

    before = content()
    ((code, out, _),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0
    assert "nothing to do" in out
    assert content() == before


def test_never_puts_the_old_run_aside(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)
    ((code, out, _),) = run_ranks(1, failure_of, str(recipe), "run.resume=never")
    assert code == 0
    assert f"moved the old run in {tmp_path / 'run'} to {tmp_path / 'run'}.old1" in out
    assert (tmp_path / "run.old1" / "summary.json").is_file()
    assert (tmp_path / "run" / "summary.json").is_file()


def test_another_recipe_is_refused_with_its_differences(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), "optimizer.lr=0.5", "run.seed=3")
    assert code == 2
    assert "optimizer.lr: 0.05 -> 0.5" in message
    assert "run.seed: 0 -> 3" in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumes_from_its_checkpoint(shards: Path, tmp_path: Path, world_size: int) -> None:
    from safetensors.torch import load_file

    sections = {
        "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
        "optimizer": {"name": "adam", "lr": 0.01},
        "data": {"augment": ["flip"]},
        "checkpoint": {"every": "3 steps", "keep": 1},
    }
    train_ranks(world_size, write_recipe(tmp_path / "whole", shards, **sections))
    interrupted = write_recipe(tmp_path / "cut", shards, **sections)
    run_ranks(world_size, train_until, str(interrupted), 5)
    train_ranks(world_size, interrupted)

    whole, resumed = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    assert [line["step"] for line in train_lines(resumed)] == list(range(1, 9))
    assert [line["loss"] for line in train_lines(resumed)] == [line["loss"] for line in train_lines(whole)]
    first, second = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((resumed / "summary.json").read_text())["restarts"] == 1


def test_a_run_that_ended_before_its_summary_is_finished(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(2, recipe, pictures=True)
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("summary.json", "model.safetensors", "curves.png"):
        (tmp_path / "run" / name).unlink()
    train_ranks(2, recipe)
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (after["status"], after["eval"]) == ("finished", before["eval"])
    assert (tmp_path / "run" / "model.safetensors").is_file()


def end_with_new_weights(recipe: str, *overrides: str) -> None:
    """Runs in a rank: trains, and is gone between the final weights and the summary."""
    from shardstep.launch import train
    from shardstep.trainer import finish

    class Killed(Exception):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    finish.draw_pictures = kill
    finish.fail = lambda run, error: None  # a kill leaves no time for its summary
    with pytest.raises(Killed):
        train.main([recipe, *overrides])


def test_an_extended_run_that_ended_before_its_summary_is_finished(shards: Path, tmp_path: Path) -> None:
    """Its folder has a summary, of the shorter run."""
    recipe = write_recipe(tmp_path, shards, train={"duration": "3 steps"})
    train_ranks(1, recipe)
    longer = ["train.duration=5 steps", "run.allow_changes=[train.duration]"]
    run_ranks(1, end_with_new_weights, str(recipe), *longer)
    assert find_weights(tmp_path / "run")[0].parent.name == "step-00000005"
    train_ranks(1, recipe, *longer)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 5)
    assert find_weights(tmp_path / "run")[0] == tmp_path / "run" / "model.safetensors"


def test_an_extended_run_that_was_killed_at_its_last_checkpoint_is_finished(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, train={"duration": "3 steps"})
    train_ranks(1, recipe)
    earlier = (tmp_path / "run" / "summary.json").read_text()
    longer = ["train.duration=5 steps", "run.allow_changes=[train.duration]"]
    train_ranks(1, recipe, *longer)
    (tmp_path / "run" / "summary.json").write_text(earlier)
    train_ranks(1, recipe, *longer)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 5


def test_a_folder_with_other_files_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    recipe = write_recipe(tmp_path, shards)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), f"run.dir={tmp_path / 'home'}")
    assert code == 2
    assert "holds files that are not a run's" in message
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_folder_left_by_a_kill_before_its_recipe_was_complete_is_reused(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "config.yaml.partial").write_text("run: {na")
    train_ranks(1, write_recipe(tmp_path, shards))
    assert (folder / "model.safetensors").is_file()
    assert not list(tmp_path.glob("run.old*"))
    assert not list(folder.glob("*.partial"))


def test_a_bad_recipe_does_not_put_the_old_run_aside(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)
    ((code, _, _),) = run_ranks(1, failure_of, str(recipe), "run.resume=never", "data.train=/nowhere")
    assert code == 2
    assert (tmp_path / "run" / "summary.json").is_file()


def test_another_data_set_is_not_continued_on(shards: Path, tmp_path: Path) -> None:
    from shardstep.datasets.write import write_shards

    recipe = write_recipe(tmp_path, shards)
    train_ranks(1, recipe)
    write_shards("synthetic:101", "train", tmp_path / "other", samples_per_shard=10)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), f"data.train={tmp_path / 'other'}")
    assert code == 2
    assert "was trained on another data set" in message


def test_another_test_set_has_to_be_asked_for(shards: Path, tmp_path: Path) -> None:
    from shardstep.datasets.write import write_shards

    sections: dict[str, Any] = {"train": {"duration": "6 steps"}, "checkpoint": {"every": "2 steps"}}
    recipe = write_recipe(tmp_path, shards, **sections)
    run_ranks(2, train_until, str(recipe), 5)
    shutil.copytree(shards / "test", tmp_path / "moved")
    write_shards("synthetic:40", "test", tmp_path / "other", samples_per_shard=10)
    other = f"data.test={tmp_path / 'other'}"
    for code, _, message in run_ranks(2, failure_of, str(recipe), other):
        assert code == 2
        assert "error" not in message or "step-00000004 was evaluated on another test set" in message
        assert "error" not in message or "run.allow_changes=[data.test]" in message
    train_ranks(2, recipe, f"data.test={tmp_path / 'moved'}")  # what counts is what is in it
    train_ranks(2, recipe, other, "run.allow_changes=[data.test,train.duration]", "train.duration=7 steps")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["test_samples"] == 40
    assert summary["best"]["step"] == 7  # that of step 4 or 6 was on other images


# --- the tracker ------------------------------------------------------------------------------------------------------


def test_wandb_offline_holds_what_was_logged(shards: Path, tmp_path: Path) -> None:
    train_ranks(2, write_recipe(tmp_path, shards, log={"wandb": "offline", "wandb_tags": ["a", "b"]}))
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    history, config, _ = read_wandb(path)
    losses = [line["loss"] for line in train_lines(tmp_path / "run")]
    assert [entry["train/loss"] for entry in history if "train/loss" in entry] == pytest.approx(losses)
    assert len([entry for entry in history if "eval/accuracy" in entry]) == 2
    assert config["optimizer"]["lr"] == 0.05


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "failure"])
def test_wandb_resumes_the_same_run(shards: Path, tmp_path: Path, end: str) -> None:
    """Interrupted in step 8: two files of one run, which hold each step once. A kill leaves the first one empty."""
    sections: dict[str, Any] = {
        "train": {"duration": "11 steps"},
        "eval": {"every": "5 steps"},
        "checkpoint": {"every": "3 steps"},
        "log": {"every": "1 steps", "wandb": "offline"},
    }
    recipe = write_recipe(tmp_path, shards, **sections)
    with pytest.raises(AssertionError, match="died without a word") if end == "SIGKILL" else nullcontext():
        run_ranks(1, ending_in_step_8, str(recipe), end)
    train_ranks(1, recipe)
    pieces = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(pieces) == 2
    assert len({path.stem for path in pieces}) == 1  # run-<id>
    first, second = (read_wandb(path) for path in pieces)
    assert second[2] == pieces[0].stem.removeprefix("run-")
    if end != "SIGKILL":
        assert first[2] == second[2]
        assert first[1]["optimizer"] == second[1]["optimizer"]
    history = first[0] + second[0]
    assert [entry["_step"] for entry in history if "train/loss" in entry] == list(range(1, 12))
    assert [entry["_step"] for entry in history if "eval/loss" in entry] == [5, 10, 11]
    losses = [line["loss"] for line in train_lines(tmp_path / "run")]
    assert [entry["train/loss"] for entry in history if "train/loss" in entry] == pytest.approx(losses)


def log_to_wandb(folder: str, num_steps: int) -> None:
    """Runs in a rank."""
    import wandb

    with wandb.init(mode="offline", dir=folder, project="test") as run:
        for step in range(num_steps):
            run.log({f"train/value{number}": step + number / 7 for number in range(40)}, step=step)


def test_a_cut_wandb_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run_ranks(1, log_to_wandb, str(tmp_path), 60)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    give_up = time.monotonic() + HANG_S
    while logged_steps(path) != {"train": 59}:  # wandb's own process may outlive the rank's, and write until then
        assert time.monotonic() < give_up
        time.sleep(0.1)
    content, steps = path.read_bytes(), []
    assert len(content) > 3 * 32768  # a record may go over the end of a block
    for size in range(7, len(content), len(content) // 6):  # each is read in 2 s
        path.write_bytes(content[:size])
        steps.append(logged_steps(path).get("train", -1))
    assert steps == sorted(steps)
    assert len(set(steps)) >= 5


def ending_in_step_8(recipe: str, end: str) -> None:
    """Runs in a rank: a signal, or bad data, when step 7 is logged."""
    from shardstep.configs.errors import InputError
    from shardstep.trainer import loop

    function = loop.train_step

    def step(run, batch):  # type: ignore[no-untyped-def]
        if run.state.progress.step == 7:
            if end == "failure":
                raise InputError("a shard is damaged")
            os.kill(os.getpid(), getattr(signal, end))
        time.sleep(0.1)
        return function(run, batch)

    loop.train_step = step
    failure_of(recipe)


def read_wandb(path: Path) -> tuple[list[dict], dict, str]:
    """History, config and id of an offline file of wandb, by wandb's own reader."""
    records = read_records(path)
    history = [record["history"]["item"] for record in records if "item" in record.get("history", {})]
    runs = [record["run"] for record in records if "run" in record]
    config = {key: value for run in runs for key, value in run.get("config", {}).get("update", {}).items()}
    return history, config, runs[-1]["run_id"] if runs else ""


def test_a_tracker_that_fails_does_not_hurt_the_run(shards: Path, tmp_path: Path) -> None:
    ((code, _, message),) = run_ranks(
        1, with_broken_wandb, str(write_recipe(tmp_path, shards, log={"wandb": "offline"}))
    )
    assert code == 0
    assert message.count("wandb failed") == 1
    assert len(train_lines(tmp_path / "run")) == 8


def with_broken_wandb(recipe: str) -> tuple[int, str, str]:
    """Runs in a rank: wandb dies at its third line."""
    import wandb

    original, calls = wandb.init, []

    def init(**options):  # type: ignore[no-untyped-def]
        run = original(**options)

        def log(*_: object, **__: object) -> None:
            calls.append(1)
            if len(calls) > 2:
                raise BrokenPipeError("the service is gone")

        run.log = log
        return run

    wandb.init = init
    return failure_of(recipe)
