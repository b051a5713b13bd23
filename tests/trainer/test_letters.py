"""Letters in real fonts, see tests/glyphs.py: the set itself, and that partial decoding does not change what is learnt."""

import json
from pathlib import Path

import pytest
from PIL import Image

from shardstep.datasets.write import write_shards
from shardstep.launch.comparison.significance import mean_interval
from tests.glyphs import FONT_PACKAGES, LETTERS, MIN_GROUPS, font_groups, split_groups, write_letters
from tests.runs import train_ranks, write_recipe

FAST = {"device": "cpu", "precision": "bf16", "memory_format": "channels_last", "threads": 1}


@pytest.fixture(scope="module")
def groups() -> dict[str, list[str]]:
    """The fonts of this machine; the test is skipped where there are few."""
    found = font_groups()
    if len(found) < MIN_GROUPS:
        pytest.skip(f"fonts of {len(found)} names here (apt-get install {' '.join(FONT_PACKAGES[:3])} ...)")
    return found


def test_the_set_is_made_of_jpegs_of_many_sizes(groups: dict[str, list[str]], tmp_path: Path) -> None:
    write_letters(tmp_path / "one", train=2, test=1)
    write_letters(tmp_path / "two", train=2, test=1)
    files = sorted((tmp_path / "one").rglob("*.jpg"))
    assert len(files) == 3 * len(LETTERS)
    sizes = set()
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
            assert image.format == "JPEG"
        again = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert again.read_bytes() == path.read_bytes()
    assert len(sizes) > len(files) // 2
    assert 64 <= min(map(min, sizes)) <= max(map(max, sizes)) <= 256
    splits = split_groups(groups)
    assert not {file for some in splits["train"] for file in some} & {file for some in splits["test"] for file in some}


@pytest.mark.drill
def test_partial_decoding_does_not_change_what_is_learnt(groups: dict[str, list[str]], tmp_path: Path) -> None:
    """The same seeds with crop versions 2 and 3: by the interval of 95 %, accuracies are less than 5 points apart."""
    files = write_letters(tmp_path / "files", train=70, test=30)
    for split in ("train", "test"):
        write_shards(str(files), split, tmp_path / split)
    accuracies: dict[int, list[float]] = {2: [], 3: []}
    for version, found in accuracies.items():
        for seed in range(5):
            folder = tmp_path / f"{version}-{seed}"
            recipe = write_recipe(
                folder,
                tmp_path,
                run={"dir": str(folder / "run"), "seed": seed},
                data={
                    "augment": [{"name": "random_resized_crop", "size": 64, "scale": [0.25, 1]}],
                    "crop_version": version,
                },
                model={"name": "whitening_cnn", "widths": [16, 32, 64, 128], "activation": "relu"},
                optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005},
                schedule={"name": "cosine", "warmup": "0.5 epochs"},
                train=FAST | {"global_batch_size": 32, "duration": "3 epochs"},
                log={"every": "1 epochs"},
            )
            train_ranks(1, recipe)
            summary = json.loads((folder / "run" / "summary.json").read_text())
            found.append(summary["eval"]["accuracy"])
    differences = mean_interval([three - two for two, three in zip(accuracies[2], accuracies[3], strict=True)])
    assert min(accuracies[2]) > 0.4, accuracies  # guessing gives 0.04
    assert differences.half_width is not None
    assert abs(differences.mean) + differences.half_width < 0.05, accuracies
