"""`shardstep shards look`: it draws the pixels and labels that training reads at the same places of an epoch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardstep.configs.load import load_recipe
from shardstep.configs.resolve import Choices, resolve, with_keys
from shardstep.datasets.write import write_shards
from shardstep.launch import shards as command
from shardstep.launch.cli import run as run_command
from shardstep.trainer import data
from shardstep.trainer.analysis.seen_images import see_images
from shardstep.trainer.optim.losses import class_shares
from shardstep.trainer.optim.plan import make_plan
from shardstep.trainer.validate_recipe import validate_recipe
from tests.photographs import photograph_shards
from tests.runs import write_recipe

CROP = {"name": "random_resized_crop", "size": 24, "scale": [0.3, 1.0]}
SHRINK = {"name": "shrink", "size": 16, "epochs": 2}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 41 JPEGs of several sizes, and of 9 to test on."""
    return photograph_shards(tmp_path_factory.mktemp("photographs"), train=41, test=9)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 grey images of one size, with none to three labels."""
    folder = tmp_path_factory.mktemp("tagged")
    rows = ["file_name,split,tags"]
    for number in range(20):
        Image.fromarray(np.full((20, 20), 12 * number, np.uint8)).save(folder / f"{number}.png")
        tags = "|".join(["cat", "dog", "a|b"][: number % 4]) if number % 4 else ""
        rows.append(f"{number}.png,{'test' if number < 5 else 'train'},{tags}")
    (folder / "labels.csv").write_text("\n".join(rows))
    from shardstep.datasets.sources.tables import LabelOptions

    options = LabelOptions(str(folder / "labels.csv"), None, "tags", "|")
    for split in ("train", "test"):
        write_shards(str(folder), split, folder / "shards" / split, samples_per_shard=6, labels=options)
    return folder / "shards"


def read_by_ranks(recipe: Any, epoch: int, world_size: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What each position of an epoch gets in a run on several ranks: the normalised image and the shares of the classes."""
    parts = data.open_parts(recipe.data)
    device = torch.device("cpu")
    mode = data.choose_mode(recipe.data, parts, device)
    chosen = data.choose_order_version(recipe.data), data.choose_crop_version(recipe.data, parts)
    recipe = resolve(recipe, Choices(mode, "cpu", "fp32", "contiguous", "direct", *chosen))
    loaded = data.load(recipe.data, mode, parts, device)
    plan = make_plan(recipe.train, parts.train.samples, recipe.data.last_batch == "drop", world_size)
    found = {}
    for rank in range(world_size):
        place: Any = SimpleNamespace(process_index=rank, num_processes=world_size, device=device)
        for batch in data.train_batches(recipe, place, loaded, plan).from_position(epoch, 0):
            if batch.epoch > epoch:
                break
            for part in batch.micro_batches:
                shares = class_shares(part.labels, loaded.num_classes)
                found |= dict(zip(part.positions.tolist(), zip(part.images, shares, strict=True), strict=True))
    return found


@pytest.mark.parametrize(
    ("keys", "epoch", "start"),
    [
        ({"augment": [CROP, "flip", "trivial_augment", "mixup", "cutmix"]}, 0, 0),
        ({"augment": [CROP, "flip", "trivial_augment", "mixup", "cutmix"]}, 3, 17),
        ({"augment": [CROP, "cutmix"], "crop_version": 2, "lanes": 2, "window_shards": 1}, 1, 3),
        ({"resize": 24, "augment": ["alternating_flip", SHRINK, "mixup"], "last_batch": "drop"}, 1, 0),
        ({"resize": 24, "augment": [SHRINK], "normalize": "none", "order_version": 1}, 2, 25),
        ({"resize": 24, "validation": 0.3, "augment": ["translate"]}, 0, 5),
        ({"resize": 24, "fold": "2/3", "augment": ["mixup"], "workers": 0, "mode": "resident"}, 0, 1),
    ],
)
def test_what_is_drawn_is_what_training_reads(
    keys: dict[str, Any], epoch: int, start: int, photographs: Path, tmp_path: Path
) -> None:
    path = write_recipe(
        tmp_path, photographs, data=keys, train={"global_batch_size": 10, "max_micro_batch": 3}, run={"seed": 5}
    )
    recipe = validate_recipe(load_recipe(str(path)))
    place: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    seen = see_images(place, recipe, str(photographs / "train"), epoch, start, None, most=13)
    read = read_by_ranks(recipe, epoch, world_size=2)
    parts = data.open_parts(recipe.data)
    normalize = data.load(
        with_keys(recipe, data={"crop_version": 2}).data, "stream", parts, torch.device("cpu")
    ).normalize
    assert seen.positions == list(range(start, start + len(seen.keys)))
    assert len(seen.keys) >= 8
    classes = parts.train.manifest.classes
    for position, pixels, labels in zip(seen.positions, seen.trained, seen.labels, strict=True):
        image, shares = read[position]
        assert torch.equal(normalize(torch.from_numpy(pixels[None]))[0], image)
        assert [labels.get(name, 0.0) for name in classes] == pytest.approx(shares.tolist())
    assert len(np.unique(seen.trained.reshape(len(seen.keys), -1), axis=0)) > 1


def test_several_labels_and_none(tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tagged, loss={"name": "binary_cross_entropy"}, train={"global_batch_size": 15})
    arguments = ["look", str(tagged / "train"), "--recipe", str(recipe), "--grid", str(tmp_path / "look.svg")]
    assert run_command(command.main, arguments) == 0
    rows = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert set(rows) == {"none", "cat", "cat, dog", "a, b, cat, dog"}
    # mixed: of 15 the last has no partner
    assert run_command(command.main, [*arguments, "data.augment=[mixup]", "run.seed=1"]) == 0
    rows = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert any("%" in row for row in rows)
    assert "%" not in rows[-1]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 64])
def test_the_command(count: int, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides may stand anywhere, and the epoch may have fewer images than are drawn by default."""
    many = count == 64
    recipe = write_recipe(tmp_path, photographs, train={"global_batch_size": 8})
    folder, picture = photographs / "train", tmp_path / "look.png"
    size, options = "data.resize=24", ["--recipe", str(recipe), "--count", str(count), "--grid", str(picture)]
    places = [[str(folder), size, *options], [str(folder), *options, size], [*options, str(folder), size]]
    arguments = ["look", *places[count % 3], "--epoch", "2"]
    assert run_command(command.main, arguments) == (2 if many else 0)
    out, err = capsys.readouterr()
    if many:
        assert err == "error: positions 0 to 63 are outside an epoch of 41 samples\n"
        return
    assert err.splitlines()[-1] == f"{picture}: {count} image{'s' * (count > 1)}"
    assert [line.split()[0] for line in out.splitlines()] == [str(position) for position in range(count)]
    with Image.open(picture) as drawn:
        assert drawn.width > 100 * min(count, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "differ in size: set data.resize, such as data.resize=224, or begin data.augment with random_resized_crop",
        ),
        (["data.resize=24", "--start", "41"], "positions 41 to 41 are outside an epoch of 41 samples"),
        (["data.resize=24", "--start", "-1"], "--epoch and --start must be at least 0"),
        (["data.resize=24", "--count", "0"], "--count=0: draw 1 to 64 images"),
        (["data.resize=24", "--count", "65"], "--count=65: draw 1 to 64 images"),
        (["data.resize=24", "data.resise=24"], "data.resise is not a key; did you mean resize?"),
        (["data.resize=24", "--grid", "a.gif"], "--grid=a.gif must end in one of png"),
        (["data.resize=24", "--grid", "nowhere/a.png"], "--grid=nowhere/a.png: there is no folder"),
        (["data.resize=24", "--recipe", "nope"], "no recipe 'nope'"),
        (["data.resize=24", "train.global_batch_size=90"], "is more than the 41 training samples"),
        (["data.augment=[{name: random_resized_crop, size: 24}, {name: translate, pixels: 30}]"], "at least 31 pixels"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    arguments: list[str], message: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, photographs)
    given = ["look", str(photographs / "train"), "--recipe", str(recipe), "--grid", str(tmp_path / "a.png"), *arguments]
    assert run_command(command.main, given) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))
