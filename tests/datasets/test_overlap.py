"""Images that two data sets share are found by their bytes: a crc32 does not tell PNG files of one size apart."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.overlap import count_shared
from shardstep.datasets.parts import Part
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_tar import write_tar


def image(number: int, kind: str) -> bytes:
    """An image of noise; PNG files are not compressed, so all have one size."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"compress_level": 0} if kind == "png" else {}))
    return buffer.getvalue()


def part_of(folder: Path, numbers: list[int], kind: str, ids: list[int] | None = None) -> Part:
    folder.mkdir()
    for shard, some in enumerate(np.array_split(numbers, 2)):
        members = {}
        for number in some.tolist():
            members |= {f"{number:04d}.{kind}": image(number, kind), f"{number:04d}.cls": str(number % 3).encode()}
        write_tar(folder / f"{shard}.tar", members)
    assert shards_main(["index", str(folder), "--classes", "a,b,c"]) == 0
    return Part(open_shards(folder), None if ids is None else np.array(ids))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (range(30), range(30, 60), (0, 30)),
        (range(30), range(30), (30, 30)),
        (range(30), range(29, 39), (1, 10)),
        (range(6), range(30), (6, 30)),
        (range(30), range(5, 7), (2, 2)),
    ],
)
def test_shared_images_are_counted(
    tmp_path: Path, kind: str, train: range, test: range, expected: tuple[int, int]
) -> None:
    one, other = part_of(tmp_path / "a", [*train], kind), part_of(tmp_path / "b", [*test], kind)
    assert count_shared(other, one) == expected


def test_only_the_samples_of_a_part_count(tmp_path: Path) -> None:
    train = part_of(tmp_path / "a", [*range(10)], "png", ids=[0, 1, 2])
    test = part_of(tmp_path / "b", [*range(10)], "png", ids=[2, 3])
    assert count_shared(test, train) == (1, 2)  # the image 2


def test_png_files_of_one_size_have_few_crc32() -> None:
    contents = {image(number, "png") for number in range(3000)}
    assert len({len(content) for content in contents}) == 1
    # 3000**2 / 2 / 65,536 = 69 pairs are expected to collide; with 32 bits, one pair in a thousand such tests
    assert len(contents) - len({zlib.crc32(content) for content in contents}) > 30


@pytest.mark.parametrize(("limit", "expected"), [("_MOST_LOOKED_FOR", (5, 5)), ("_MOST_READ", (6, 6))])
def test_a_sample_is_looked_for_in_large_sets(
    tmp_path: Path, limit: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"shardstep.datasets.overlap.{limit}", 5)
    one, other = (part_of(tmp_path / name, [*range(30)], "png") for name in ("a", "b"))
    assert count_shared(other, one) == expected
