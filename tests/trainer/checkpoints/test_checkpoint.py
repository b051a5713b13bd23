"""Guarantees 3 and 6: resume is exact; a checkpoint is intact or it does not exist."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.launch.checkpoints import main as checkpoints_command
from shardstep.trainer.checkpoints import checkpoint_files
from shardstep.trainer.resume import find_resume, with_earlier_choices
from shardstep.trainer.validate_recipe import validate_recipe
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, train_until, write_recipe

SECTIONS: dict[str, Any] = {
    "checkpoint": {"every": "2 steps", "keep": 3},
    "eval": {"every": "100 steps"},
    "train": {"duration": "7 steps"},
}


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and run/, which has checkpoints of the steps 4, 6 and 7. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained")
    train_ranks(1, write_recipe(folder, shards, **SECTIONS))
    return folder


def copy_of(trained: Path, folder: Path, shards: Path, duration: str = "7 steps") -> Path:
    """Copy the run, as if it had been killed at the end; return its recipe."""
    shutil.copytree(trained / "run", folder / "run")
    (folder / "run" / "summary.json").unlink()
    (folder / "run" / "model.safetensors").unlink()
    sections = SECTIONS | {"train": {"duration": duration}}
    return write_recipe(folder, shards, **sections)


def steps_in(folder: Path) -> list[int]:
    return [
        checkpoint_files.step_of(path) for path in checkpoint_files.list_checkpoints(folder / "run" / "checkpoints")
    ]


def test_keeps_the_newest_and_no_rest(trained: Path) -> None:
    assert steps_in(trained) == [4, 6, 7]
    names = {path.name for path in (trained / "run" / "checkpoints" / "step-00000006").iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "state.json", "recipe.yaml", "manifest.json"}
    assert not [path for path in (trained / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


def test_the_best_stays(shards: Path, tmp_path: Path) -> None:
    # lr explodes after step 2: no later evaluation is as good
    sections: dict[str, Any] = {
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "multistep", "milestones": ["4 steps"], "gamma": 1000.0},
        "checkpoint": {"every": "2 steps", "keep": 1},
        "eval": {"every": "4 steps"},
        "train": {"duration": "12 steps"},
    }
    train_ranks(1, write_recipe(tmp_path, shards, **sections))
    evaluations = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    best = max(evaluations, key=lambda line: line["accuracy"])
    assert best["step"] == 4
    assert steps_in(tmp_path) == [4, 12]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["accuracy"] == best["accuracy"]


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path, other: Path) -> str:
    path.write_bytes(path.read_bytes()[:-3])
    return path.name


def flip(path: Path, other: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def remove(path: Path, other: Path) -> str:
    path.unlink()
    return f"{path.name} is missing"


def swap(path: Path, other: Path) -> str:
    content = path.read_bytes()
    if content == other.read_bytes():
        pytest.skip("equal in both")
    path.write_bytes(other.read_bytes())
    return path.name


@pytest.mark.parametrize("damage", [truncate, flip, remove, swap])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "recipe.yaml", "manifest.json"])
def test_damage_is_found_and_reported(trained: Path, tmp_path: Path, name: str, damage: Any) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "run" / "checkpoints", folder)
    expected = damage(folder / "step-00000007" / name, folder / "step-00000006" / name)
    found, passed_over = checkpoint_files.newest_intact(folder)
    assert found == folder / "step-00000006"
    assert len(passed_over) == 1
    assert "step-00000007" in passed_over[0]
    assert expected in passed_over[0]


def test_every_single_flipped_bit_of_a_manifest_is_found(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000007"
    shutil.copytree(trained / "run" / "checkpoints" / path.name, path)
    content = (path / "manifest.json").read_bytes()
    whole = json.loads(content)
    for place in range(len(content)):
        for bit in (0, 4):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (path / "manifest.json").write_bytes(changed)
            try:
                same = json.loads(changed) == whole  # another kind of white space
            except ValueError:
                same = False
            assert bool(checkpoint_files.problems_of(path)) != same, (place, bit)


def test_another_steps_folder_is_found(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run" / "checkpoints" / "step-00000006", tmp_path / "step-00000009")
    assert "belongs to step 6" in checkpoint_files.problems_of(tmp_path / "step-00000009")[0]


def test_resume_passes_over_damage_and_says_so(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    flip(tmp_path / "run" / "checkpoints" / "step-00000007" / "optimizer.pt", tmp_path)
    remove(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json", tmp_path)
    ((code, output, message),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0
    assert "step-00000007: optimizer.pt is damaged" in message
    assert "step-00000006: state.json is missing" in message
    assert "resuming from" in output
    assert "step-00000004" in output
    first, second = load_file(trained / "run" / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["loss"] for line in train_lines(tmp_path / "run")] == [
        line["loss"] for line in train_lines(trained / "run")
    ]
    assert not any(
        checkpoint_files.problems_of(path)
        for path in checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints")
    )


def test_a_checkpoint_with_a_damaged_recipe_is_skipped(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    (tmp_path / "run" / "checkpoints" / "step-00000007" / "recipe.yaml").write_text("{no: [recipe")
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), "data.mode=auto")
    assert code == 0
    assert "step-00000007: recipe.yaml has" in message


def test_when_all_are_damaged_nothing_is_begun_anew(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    for path in checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints"):
        remove(path / "manifest.json", path)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert "all checkpoints of" in message
    assert message.count("manifest.json is missing") == 3
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 0


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, ("touch /tmp/shardstep-was-here",)


def test_code_in_a_checkpoint_is_not_run(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Even if the manifest has been changed to match."""
    import hashlib

    marker = Path("/tmp/shardstep-was-here")
    marker.unlink(missing_ok=True)
    recipe = copy_of(trained, tmp_path, shards)
    path = tmp_path / "run" / "checkpoints" / "step-00000007"
    torch.save({"state": Evil()}, path / "optimizer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))
    assert not checkpoint_files.problems_of(path)
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe))
    assert code == 2
    assert "cannot be resumed from" in message
    assert not marker.exists()


def test_the_command_lists_and_verifies(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    assert checkpoints_command(["list", str(tmp_path / "run")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "step-00000004",
        "step-00000006",
        "step-00000007",
    ]
    assert checkpoints_command(["verify", str(tmp_path / "run")]) == 0
    truncate(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"step-00000006: model.safetensors has [\d,]+ bytes instead of"):
        checkpoints_command(["verify", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        checkpoints_command(["list", str(tmp_path)])


# --- another recipe ---------------------------------------------------------------------------------------------------


def test_changes_have_to_be_asked_for(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    changes = ["optimizer.lr=0.01", "train.duration=9 steps"]
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), *changes)
    assert code == 2
    assert "optimizer.lr: 0.05 -> 0.01" in message
    assert "run.allow_changes=[train.duration,optimizer.lr]" in message
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), *changes, "run.allow_changes=[optimizer.lrr]")
    assert (code, "run.allow_changes: these keys may change anyway, or do not exist: optimizer.lrr" in message) == (
        2,
        True,
    )
    train_ranks(1, recipe, *changes, "run.allow_changes=[train.duration,optimizer.lr]")
    lines = train_lines(tmp_path / "run")
    assert [(line["step"], line["lr"]) for line in lines[-3:]] == [(7, 0.05), (8, 0.01), (9, 0.01)]
    # and the optimizer has it, too: it is plain SGD, whose steps are lr times a gradient of much the same length
    folders = {6: trained / "run", 7: trained / "run", 9: tmp_path / "run"}
    weights = {
        step: load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step, run in folders.items()
    }
    moved = {
        (a, b): sum((weights[b][name] - weights[a][name]).square().sum().item() for name in weights[a]) ** 0.5
        for a, b in ((6, 7), (7, 9))
    }
    assert moved[7, 9] < 2 * 0.5 * moved[6, 7]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("eval.views=mirror_translate", "eval.views: plain -> mirror_translate"),
        (["eval.views=mirror", "eval.sure_above=0.9"], "eval.sure_above: None -> 0.9"),
        ("data.normalize=none", "data.normalize: manifest -> none"),
        ("train.clip_norm=1", "train.clip_norm: None -> 1.0"),
        ("model.hidden=[8]", "model.hidden: [16] -> [8]"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: 0.0 -> 0.1"),
    ],
)
def test_what_changes_the_meaning_of_numbers_is_refused(
    trained: Path, shards: Path, tmp_path: Path, change: str | list[str], difference: str
) -> None:
    path, changes = copy_of(trained, tmp_path, shards), [change] if isinstance(change, str) else change
    keys = ",".join(text.split("=")[0] for text in changes)

    def find(*overrides: str) -> Path | None:
        return find_resume(with_earlier_choices(validate_recipe(load_recipe(str(path), overrides)))).path

    with pytest.raises(InputError) as raised:
        find(*changes)
    assert difference in str(raised.value)
    assert f"run.allow_changes=[{keys}]" in str(raised.value)
    assert find(*changes, f"run.allow_changes=[{keys}]") == tmp_path / "run" / "checkpoints" / "step-00000007"


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_of_batch_norm_stay(world_size: int, shards: Path, tmp_path: Path) -> None:
    """Steps of 30 samples: 30 on one rank, 15 on each of two."""
    model = {"name": "whitening_cnn", "widths": [8]}
    recipe = write_recipe(tmp_path, shards, model=model, train={"duration": "1 steps"}, checkpoint={"every": "1 steps"})
    train_ranks(1, recipe)
    more = ["train.duration=2 steps", "run.allow_changes=[train.duration]"]
    (code, _, message), *_ = run_ranks(world_size, failure_of, str(recipe), *more, "train.max_micro_batch=10")
    assert code == 2
    assert "train.max_micro_batch: 2048 -> 10; batch norm computes its statistics over a micro-batch" in message
    assert "run.allow_changes=[train.duration,train.max_micro_batch]" in message
    train_ranks(world_size, recipe, *more, f"train.max_micro_batch={30 // world_size}")  # the same micro-batches
    more = ["train.duration=3 steps", "run.allow_changes=[train.duration,train.max_micro_batch]"]
    train_ranks(world_size, recipe, *more, "train.max_micro_batch=10")


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    for step in (6, 7):
        remove(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json", tmp_path)
    run_ranks(1, train_until, str(recipe), 6, "checkpoint.keep=2", "checkpoint.every=1 steps")  # saves 5 and 6
    assert steps_in(tmp_path) == [5, 6]
    assert not any(
        checkpoint_files.problems_of(path)
        for path in checkpoint_files.list_checkpoints(tmp_path / "run" / "checkpoints")
    )


def test_config_is_never_half_written(
    trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardstep.configs.load import load_recipe, save_recipe

    path = tmp_path / "config.yaml"
    shutil.copy(trained / "run" / "config.yaml", path)
    recipe = load_recipe(str(path)).recipe
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        save_recipe(recipe, path)
    assert path.read_bytes() == (trained / "run" / "config.yaml").read_bytes()


@pytest.mark.parametrize("change", ["run.seed=5", "data.lanes=3", "data.order_version=1"])
def test_the_order_cannot_change_within_an_epoch(trained: Path, shards: Path, tmp_path: Path, change: str) -> None:
    recipe = copy_of(trained, tmp_path, shards)  # 7 steps of 30: in the middle of the second epoch
    ((code, _, message),) = run_ranks(1, failure_of, str(recipe), change, f"run.allow_changes=[{change.split('=')[0]}]")
    assert code == 2
    assert "cannot change in the middle of an epoch (position 90)" in message


def test_what_does_not_change_the_mathematics_passes(trained: Path, shards: Path, tmp_path: Path) -> None:
    recipe = copy_of(trained, tmp_path, shards)
    train_ranks(2, recipe, "data.mode=stream", "data.workers=1", "train.max_micro_batch=4", "log.every=3 steps")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


# --- exact resume -----------------------------------------------------------------------------------------------------


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.05}},
    "momentum": {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
    "adagrad": {"optimizer": {"name": "adagrad", "lr": 0.01}},
    "adadelta": {"optimizer": {"name": "adadelta"}},
    "rmsprop": {"optimizer": {"name": "rmsprop", "lr": 0.001}},
    "adam": {"optimizer": {"name": "adam", "lr": 0.001}},
    "muon beside sgd": {"optimizer": {"name": "sgd", "lr": 0.05, "groups": [{"ndim": 2, "name": "muon", "lr": 0.01}]}},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16 with the scaler": {"train": {"precision": "fp16"}},
    "micro-steps": {"train": {"max_micro_batch": 4}},
    "streamed": {"data": {"mode": "stream", "augment": ["flip"]}},
    "mixed": {
        "data": {"mode": "stream", "augment": ["trivial_augment", "erasing", "mixup", "cutmix"]},
        "train": {"max_micro_batch": 3},
    },
    "batch norm": {"model": {"name": "whitening_cnn", "widths": [8, 8]}},
    "images that grow": {
        "model": {"name": "whitening_cnn", "widths": [8, 8]},
        "data": {"augment": ["alternating_flip", *({"name": "shrink", "size": 9 + n, "epochs": n} for n in (1, 2))]},
    },
    "frozen after a while": {
        "optimizer": {
            "name": "adam",
            "lr": 0.001,
            "groups": [{"match": "*.bias", "until": "5 steps"}, {"match": "1.weight", "until": "7 steps"}],
        },
        "schedule": {"name": "linear"},
    },
    "beginning later, by depth, recomputed": {
        "model": {"name": "whitening_cnn", "widths": [8, 8], "checkpoint_activations": True},
        "optimizer": {
            "name": "adam",
            "lr": 0.001,
            "layer_decay": 0.7,
            "groups": [{"match": "groups.1.*", "from": "5 steps"}, {"match": "groups.0.*", "from": "9 steps"}],
        },
    },
    "schedule-free": {"optimizer": {"name": "pytorch_optimizer/schedulefreeadamw", "lr": 0.01, "warmup_steps": 9}},
    "half weights": {
        "model": {"name": "whitening_cnn", "widths": [8, 8]},
        "train": {"precision": "bf16", "weights": "half"},
    },
    "ema": {"average": {"name": "ema", "decay": 0.9}},
    "lookahead": {"average": {"name": "lookahead", "every": "4 steps", "rise": 1.0}},
    "filter_muon and a sum": {
        "model": {"name": "whitening_cnn", "widths": [8, 8]},
        "optimizer": {"name": "sgd", "lr": 0.01, "groups": [{"ndim": 4, "name": "filter_muon", "renormalize": True}]},
        "loss": {"name": "cross_entropy", "reduction": "sum"},
    },
    "stochastic depth": {"model": {"name": "convnet", "dropout": 0.5}, "loss": {"name": "nll"}},
}


@pytest.mark.parametrize("world_size", [1, 2, *(pytest.param(size, marks=pytest.mark.drill) for size in (3, 4))])
def test_resume_is_bitwise(shards: Path, tmp_path: Path, world_size: int) -> None:
    """Interrupted after step 7, between two checkpoints and in the middle of an epoch."""
    whole, cut = [], []
    for name, case in CASES.items():
        sections = {
            "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
            "checkpoint": {"every": "3 steps", "keep": 1},
            "eval": {"every": "5 steps"},
        } | case
        sections["train"] = {"duration": "11 steps"} | case.get("train", {})
        whole.append(str(write_recipe(tmp_path / name / "whole", shards, **sections)))
        cut.append(str(write_recipe(tmp_path / name / "cut", shards, **sections)))
    run_ranks(world_size, train_all, whole)
    run_ranks(world_size, break_all_off, cut, 7)
    run_ranks(world_size, train_all, cut)
    for name in CASES:
        one, other = tmp_path / name / "whole" / "run", tmp_path / name / "cut" / "run"
        first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        assert all(torch.equal(first[key], second[key]) for key in first), (name, world_size)
        assert logged(one) == logged(other), (name, world_size)
        assert json.loads((other / "summary.json").read_text())["restarts"] == 1


def logged(run: Path) -> list[dict[str, Any]]:
    """What must be the same, line by line."""
    compared = ("kind", "step", "samples", "loss", "accuracy", "train_loss", "lr")
    return [{key: line.get(key) for key in compared} for line in read_lines(run / "metrics.jsonl")]


def train_all(recipes: list[str]) -> None:
    """Runs in a rank: one recipe after another in one world."""
    from accelerate.state import AcceleratorState

    from shardstep.launch import train
    from shardstep.trainer import finish

    finish.leave_world = lambda accelerator: None  # the world goes on to the next recipe
    for recipe in recipes:
        AcceleratorState._reset_state()  # whose precision may be another
        assert train.main([recipe]) == 0


def break_all_off(recipes: list[str], step: int) -> None:
    """Runs in a rank: each recipe is interrupted after a step."""
    from accelerate.state import AcceleratorState

    for recipe in recipes:
        AcceleratorState._reset_state()
        train_until(recipe, step)


def test_the_world_changes_and_no_sample_is_missed(shards: Path, tmp_path: Path) -> None:
    """2 -> 3 -> 1 ranks, and another batch size, over the first epoch: its samples are the data set's, each once."""
    from shardstep.datasets.manifest import open_shards

    sections: dict[str, Any] = {
        "train": {"global_batch_size": 9, "duration": "2 epochs"},
        "checkpoint": {"every": "2 steps"},
        "log": {"every": "1 steps", "sample_keys": True},
    }
    recipe = write_recipe(tmp_path, shards, **sections)
    run_ranks(2, train_until, str(recipe), 5)  # goes on from step 4, sample 36
    run_ranks(3, train_until, str(recipe), 9)  # goes on from step 8, sample 72
    train_ranks(1, recipe, "train.global_batch_size=11", "run.allow_changes=[train.global_batch_size]")
    consumed = [line for path in (tmp_path / "run").glob("samples-rank*.jsonl") for line in read_lines(path)]
    opened = open_shards(shards / "train")
    keys = Counter(opened.key(number) for number in range(101))
    for epoch in (0, 1):
        assert Counter(line["key"] for line in consumed if line["epoch"] == epoch) == keys
        positions = sorted(line["position"] for line in consumed if line["epoch"] == epoch)
        assert positions == list(range(101))
    starts = json.loads((sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())[
        "starts"
    ]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 2), (4, 3), (8, 1)]
