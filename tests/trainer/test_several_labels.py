"""Training on images with several labels: losses against references, exact scores, the same on any number of ranks."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.mix import mix_shards
from shardstep.datasets.write import write_shards
from shardstep.launch.report import main as report
from shardstep.trainer.optim.label_scores import score_labels
from shardstep.trainer.optim.losses import (
    asymmetric,
    binary_cross_entropy,
    build_objective,
    class_weights,
    cross_entropy,
    focal,
)  # fmt: skip
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar
from tests.distributed import run_command, run_ranks
from tests.runs import failure_of, read_lines, train_lines, train_ranks, write_recipe

CLASSES = ["bird", "cat", "dog", "fish"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (101 images with 0 to 4 labels) and test/ (53)."""
    from shardstep.launch.shards import main as shards_main

    folder, rng = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    for split, count in (("train", 101), ("test", 53)):
        (folder / split).mkdir()
        members = {}
        for number in range(count):
            labels = [name for name in CLASSES if rng.random() < 0.4]
            # fmt: off
            members |= {f"{number:03d}.png": png(60 * len(labels) + number % 7, size=(8, 8)),
                        f"{number:03d}.json": json.dumps({"labels": labels}).encode()}
            # fmt: on
        write_tar(folder / split / "a.tar", members)
        assert shards_main(["index", str(folder / split), "--label", "json:labels"]) == 0
    return folder


def recipe_of(folder: Path, shards: Path, loss: str = "binary_cross_entropy", **sections: dict[str, Any]) -> Path:
    return write_recipe(folder, shards, loss={"name": loss}, **sections)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# --- losses -----------------------------------------------------------------------------------------------------------


def random_case(rows: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(rows, classes, generator=generator)
    return outputs, (torch.rand(rows, classes, generator=generator) < 0.4).float()


def test_binary_cross_entropy_is_torchs() -> None:
    outputs, shares = random_case()
    theirs = functional.binary_cross_entropy_with_logits(outputs, shares, reduction="none").mean(1)
    assert torch.allclose(binary_cross_entropy(outputs, shares), theirs)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    theirs = functional.binary_cross_entropy_with_logits(outputs, shares, pos_weight=weights, reduction="none").mean(1)
    assert torch.allclose(binary_cross_entropy(outputs, shares, weights), theirs)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    one_hot = functional.one_hot(labels, 5).float()
    assert torch.equal(binary_cross_entropy(outputs, labels), binary_cross_entropy(outputs, one_hot))
    smooth = binary_cross_entropy(outputs, labels, label_smoothing=0.1)
    theirs = functional.binary_cross_entropy_with_logits(outputs, one_hot * 0.9 + 0.02, reduction="none").mean(1)
    assert torch.allclose(smooth, theirs)


def test_focal_loss_is_torchvisions_without_alpha() -> None:
    outputs, shares = random_case()
    theirs = sigmoid_focal_loss(outputs, shares, alpha=-1, gamma=2, reduction="none").mean(1)
    assert torch.allclose(focal(outputs, shares), theirs)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    entropy = cross_entropy(outputs, labels)
    assert torch.allclose(focal(outputs, labels, gamma=1.5), (1 - torch.exp(-entropy)) ** 1.5 * entropy)
    assert torch.allclose(focal(outputs, labels, gamma=0.0), entropy)


def test_asymmetric_loss_is_the_papers() -> None:
    """Equations 4 to 7, written out for each class."""
    outputs, shares = random_case()
    expected = []
    for row, holds in zip(outputs.double().sigmoid().tolist(), shares.tolist(), strict=True):
        total = 0.0
        for p, y in zip(row, holds, strict=True):
            shifted = max(p - 0.05, 0.0)
            total -= (1 - p) * np.log(p) if y else shifted**4 * np.log(1 - shifted)
        expected.append(total)
    assert asymmetric(outputs, shares, gamma_positive=1.0).tolist() == pytest.approx(expected, rel=1e-5)
    extreme = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = asymmetric(extreme, torch.tensor([[0.0, 1.0]])).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert extreme.grad is not None
    assert torch.isfinite(extreme.grad).all()


def test_cross_entropy_takes_shares() -> None:
    outputs, _ = random_case()
    shares = torch.rand(6, 5).softmax(dim=1)
    assert torch.allclose(cross_entropy(outputs, shares), -(shares * outputs.log_softmax(1)).sum(1))


def test_class_weights() -> None:
    having = np.array([10, 30, 0])
    assert class_weights("none", ["a", "b", "c"], having, 40, several=False) is None
    balanced = class_weights("balanced", ["a", "b", "c"], having, 40, several=False)
    assert balanced is not None
    assert balanced.tolist() == pytest.approx([40 / 3 / 10, 40 / 3 / 30, 1.0])  # the third has no sample to weight
    positive = class_weights("balanced", ["a", "b", "c"], having, 40, several=True)
    assert positive is not None
    assert positive.tolist() == pytest.approx([3.0, 10 / 30, 1.0])
    given = class_weights({"b": 2}, ["a", "b"], np.array([1, 1]), 2, several=False)
    assert given is not None
    assert given.tolist() == [1.0, 2.0]

    outputs, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    loss = {"name": "cross_entropy", "label_smoothing": 0.0, "reduction": "mean", "class_weights": "balanced"}
    objective = build_objective(loss, {})
    from dataclasses import replace

    weighted = replace(objective, class_weights=balanced).loss(outputs, outputs, labels)
    theirs = functional.cross_entropy(outputs, labels, weight=balanced, reduction="sum")
    assert weighted.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert objective.evaluation_loss(outputs, labels).sum().item() == pytest.approx(
        functional.cross_entropy(outputs, labels, reduction="sum").item()
    )


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [None, 4], ids=["different scores", "many ties"])
def test_scores_are_scikit_learns(distinct: int | None) -> None:
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(200, 6)).astype(np.float32)
    if distinct:
        outputs = np.round(outputs * distinct / 4)
    shares = (rng.random((200, 6)) < [0.5, 0.3, 0.1, 0.02, 0.9, 1.0]).astype(np.float32)
    found = score_labels(torch.from_numpy(outputs), torch.from_numpy(shares), 0.6)
    theirs = average_precision_score(shares, outputs, average=None)
    assert found.average_precision == pytest.approx(theirs.tolist(), rel=1e-9)
    assert found.mean_average_precision == pytest.approx(theirs.mean())
    decided = 1 / (1 + np.exp(-outputs.astype(np.float64))) >= 0.6
    assert found.f1 == pytest.approx(f1_score(shares, decided, average=None, zero_division=0).tolist())
    assert found.f1_macro == pytest.approx(f1_score(shares, decided, average="macro", zero_division=0))
    assert found.f1_micro == pytest.approx(f1_score(shares, decided, average="micro"))


def test_a_class_without_samples_does_not_count() -> None:
    found = score_labels(torch.tensor([[1.0, 3.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.5)
    assert found.average_precision == [1.0, None]
    assert found.mean_average_precision == 1.0
    nothing = score_labels(torch.tensor([[-1.0]]), torch.tensor([[0.0]]), 0.5)
    assert (nothing.mean_average_precision, nothing.f1_macro, nothing.f1_micro) == (0.0, 0.0, 0.0)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"class_weights": "balanced"}, {"augment": ["mixup", "cutmix"]}],
    ids=["plain", "weights", "mixed"],
)
def test_ranks_and_modes_agree(options: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    losses, summaries = [], []
    weights = {"class_weights": options["class_weights"]} if "class_weights" in options else {}
    augment = {"augment": options["augment"]} if "augment" in options else {}
    for world_size, mode in ((1, "resident"), (2, "stream"), (3, "resident")):
        folder = tmp_path / f"{world_size}"
        recipe = write_recipe(folder, labelled, loss={"name": "asymmetric", **weights}, data={"mode": mode, **augment})
        train_ranks(world_size, recipe)
        losses.append([line["loss"] for line in train_lines(folder / "run")])
        scores = summary_of(folder / "run")["eval"]
        assert scores.pop("accuracy") is scores.pop("top5") is None
        summaries.append(scores)
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)
        assert summaries[other] == pytest.approx(summaries[0], rel=1e-5)
    assert 0 < summaries[0]["map"] <= 1


@pytest.mark.parametrize("choice", ["sampling", "mix"])
def test_samples_are_drawn_the_same_on_any_number_of_ranks(choice: str, labelled: Path, tmp_path: Path) -> None:
    folders = [{"dir": str(labelled / name), "weight": weight} for name, weight in (("train", 1), ("test", 2))]
    data = {"sampling": "balanced"} if choice == "sampling" else {"mix": folders, "train": ""}
    losses = []
    for world_size in (1, 2):
        folder = tmp_path / f"{world_size}"
        recipe = recipe_of(folder, labelled, data={**data, "mode": "stream" if world_size == 2 else "resident"})
        train_ranks(world_size, recipe)
        losses.append([line["loss"] for line in train_lines(folder / "run")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_mix_has_the_labels_of_its_sets(labelled: Path) -> None:
    sets = [open_shards(labelled / name) for name in ("train", "test")]
    mixed = mix_shards(sets)
    assert mixed.manifest.has_several_labels
    expected = np.concatenate([one.targets(np.arange(one.manifest.samples)) for one in sets])
    assert np.array_equal(mixed.targets(np.arange(154)), expected)
    assert mixed.manifest.samples_per_class == expected.sum(axis=0).tolist()


def test_a_run_from_its_start_to_its_report(labelled: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, labelled, optimizer={"name": "adam", "lr": 0.01}, data={"validation": 0.2})
    ((code, output, _),) = run_ranks(1, failure_of, str(recipe), pictures=True)
    assert code == 0
    run = tmp_path / "run"
    found = summary_of(run)
    assert re.search(r"validation loss \d\.\d{4}  mAP \d+\.\d\d%", output)
    assert re.search(
        r"done: test mAP \d+\.\d\d%, F1 \d+\.\d\d% \(micro \d+\.\d\d%\), loss \d\.\d{4} on 53 images", output
    )
    evaluations = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
    assert found["best"]["score"] == found["best"]["map"] == max(line["map"] for line in evaluations)
    assert found["validation"]["map"] == evaluations[-1]["map"]
    assert len(evaluations[-1]["per_class_ap"]) == 4
    answer = json.loads(run_command("evaluate", str(run), cwd=tmp_path).stdout.splitlines()[-1])
    assert {key: value and round(value, 5) for key, value in answer.items()} == {
        key: value and round(value, 5) for key, value in (found["eval"] | {"samples": 53, "world_size": 1}).items()
    }
    image = tmp_path / "x.png"
    image.write_bytes(png(180, size=(8, 8)))
    lines = run_command("predict", str(run), str(image), cwd=tmp_path).stdout.splitlines()
    assert re.fullmatch(rf"{image}(  [+-] (bird|cat|dog|fish) \d+\.\d %\s*)+", lines[0])
    said = json.loads(run_command("predict", str(run), str(image), "--json", cwd=tmp_path).stdout)
    assert said["labels"] == [one["class"] for one in said["top"] if one["probability"] >= 0.5]
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "test mAP" in page
    assert "Average precision of each class" in page
    assert (run / "predictions.png").is_file()


def test_a_resumed_run_goes_on_exactly(labelled: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        recipe_of(folder, labelled, train={"duration": "8 steps"})
    train_ranks(1, whole / "recipe.yaml")
    train_ranks(1, halves / "recipe.yaml", "train.duration=3 steps")
    train_ranks(1, halves / "recipe.yaml", "run.allow_changes=[train.duration]")
    assert (whole / "run" / "model.safetensors").read_bytes() == (halves / "run" / "model.safetensors").read_bytes()
    ((code, _, error),) = run_ranks(1, failure_of, str(halves / "recipe.yaml"), "eval.threshold=0.3")
    assert code == 2
    assert "eval.threshold" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.name=cross_entropy"],
            "takes shares of labels that sum to 1 for each image.*use loss.name=binary_cross",
        ),
        (["loss.name=perceptron"], "loss.name=perceptron takes one label for each image, but those of .* have several"),
        (["loss.class_weights={cow: 2}"], r"loss.class_weights has no class cow; known: bird, cat, dog, fish"),
        (["loss.class_weights=7"], "loss.class_weights=7 must be none, balanced, or a mapping of class names"),
        (["loss.class_weights={cat: -1}"], "must be none, balanced, or a mapping of class names to weights from 0"),
        (["eval.threshold=1"], "eval.threshold=1.0 must be a probability between 0 and 1"),
        (["data.label_separator=x"], "data.label_separator=x has no effect without data.source"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str, labelled: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, labelled)
    ((code, _, error),) = run_ranks(1, failure_of, str(recipe), *overrides)
    assert code == 2
    assert re.search(message, " ".join(error.split()))


def test_sets_of_both_kinds_are_refused(labelled: Path, tmp_path: Path) -> None:
    from shardstep.configs.errors import InputError
    from shardstep.trainer.data import check_same_task

    write_shards("synthetic:8", "train", tmp_path / "one")
    several = open_shards(labelled / "train").manifest
    single = SimpleNamespace(**{**vars(open_shards(tmp_path / "one").manifest), "classes": several.classes,
                                "has_several_labels": False, "shape_when_read": several.shape_when_read})  # fmt: skip
    with pytest.raises(InputError, match="the images of A have several labels, those of B one each"):
        check_same_task(several, single, "A", "B", None)  # type: ignore[arg-type]


def test_shares_of_one_label_are_cross_entropys(tmp_path: Path) -> None:
    """As of several annotators: accuracy counts the class with the largest share."""
    from shardstep.launch.shards import main as shards_main

    (tmp_path / "train").mkdir()
    members = {}
    for number in range(40):
        shares = {"dark": 0.8, "light": 0.2} if number % 2 else {"dark": 0.3, "light": 0.7}
        # fmt: off
        members |= {f"{number:03d}.png": png(20 if number % 2 else 220, size=(8, 8)),
                    f"{number:03d}.json": json.dumps({"labels": shares}).encode()}
        # fmt: on
    write_tar(tmp_path / "train" / "a.tar", members)
    assert shards_main(["index", str(tmp_path / "train"), "--label", "json:labels"]) == 0
    data = {"test": str(tmp_path / "train")}
    train_ranks(1, write_recipe(tmp_path, tmp_path, loss={"name": "cross_entropy"}, data=data))
    found = summary_of(tmp_path / "run")["eval"]
    assert found["accuracy"] == 1.0
    assert found["loss"] >= 0.5 * (-0.8 * np.log(0.8) - 0.2 * np.log(0.2) - 0.3 * np.log(0.3) - 0.7 * np.log(0.7))
    assert report([str(tmp_path / "run")]) == 0
