"""Guarantee 5: no damaged data passes. A truncated, flipped, swapped or missing shard is an error that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.resident import load_resident
from shardstep.datasets.verify import verify_shards


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_intact_data_passes(folder: Path) -> None:
    assert verify_shards(folder) == []


def test_every_flipped_byte_is_found(folder: Path) -> None:
    path = folder / "train-000002.tar"
    intact, random = path.read_bytes(), np.random.default_rng(0)
    for place in random.integers(0, len(intact), 150).tolist():
        flip(path, place)
        problems = verify_shards(folder)
        assert problems, place
        assert all(problem.startswith("train-000002.tar") for problem in problems)
        path.write_bytes(intact)


def test_a_flipped_image_byte_names_the_sample(folder: Path) -> None:
    opened = open_shards(folder)
    entry = opened.index[40]  # sample 40 = number 6 of shard 2
    flip(folder / "train-000002.tar", int(entry["block"]) * 512 + 100)
    assert any("sample 000040 (number 6" in problem for problem in verify_shards(folder))
    with pytest.raises(InputError, match=r"train-000002\.tar: sample 000040 is damaged"):
        StreamReader(opened).read(np.arange(101))


def test_a_flipped_label_is_named(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    place = data.index(b"000003.cls") + 512
    path.write_bytes(data[:place] + b"x" + data[place + 1 :])
    assert any("label of sample 000003" in problem for problem in verify_shards(folder))


def test_a_label_that_became_another_is_named(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    flip(path, data.index(b"000003.cls") + 512)
    assert any("label of sample 000003" in problem for problem in verify_shards(folder))


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """A process may have 64 files open here, and the data set has 80 shards."""
    import subprocess
    import sys

    from shardstep.datasets.write import write_shards

    write_shards("synthetic:80", "train", tmp_path / "many", samples_per_shard=1)
    code = (
        "import resource, sys, numpy as np; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from shardstep.datasets import reader; reader._MOST_OPEN_SHARDS = 16;"
        "from shardstep.datasets.manifest import open_shards;"
        "print(len(reader.StreamReader(open_shards(sys.argv[1])).read(np.arange(80))[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "many")], capture_output=True, text=True)
    assert result.stdout == "80\n", result.stderr


def test_an_index_of_another_length(folder: Path) -> None:
    import hashlib

    from shardstep.datasets.manifest import parse_manifest

    data = (folder / "index").read_bytes()[:-20]
    (folder / "index").write_bytes(data)
    content = json.loads((folder / "manifest.json").read_text())
    content["index_sha256"] = hashlib.sha256(data).hexdigest()
    del content["fingerprint"]
    shards = [dict(shard) for shard in content["shards"]]
    from shardstep.datasets.manifest import Manifest, Shard

    manifest = Manifest(**(content | {"shards": [Shard(**shard) for shard in shards]}))
    content["fingerprint"] = manifest.computed_fingerprint()
    (folder / "manifest.json").write_text(json.dumps(content))
    assert parse_manifest((folder / "manifest.json").read_text(), "x").samples == 101
    with pytest.raises(InputError, match="100 entries for 101 samples"):
        open_shards(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path: Path) -> None:
    other = path.with_name("train-000001.tar")
    held = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(held)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "train-000003.tar is cut off"),
        (extend, "train-000003.tar is extended"),
        (Path.unlink, "train-000003.tar is missing"),
        (swap, "train-000003.tar holds the bytes of train-000001.tar"),
    ],
)
def test_damaged_files_are_named(folder: Path, damage: Callable[[Path], None], expected: str) -> None:
    damage(folder / "train-000003.tar")
    assert any(problem.startswith(expected) for problem in verify_shards(folder))
    if damage is not swap:  # a swap of shards of one size is found by the samples' crc32, below
        with pytest.raises(InputError, match=expected):
            open_shards(folder)


def test_swapped_shards_are_found_while_reading(folder: Path) -> None:
    for name in ("train-000001.tar", "train-000003.tar"):  # make them equally long, so that no size gives it away
        assert (folder / name).stat().st_size == (folder / "train-000001.tar").stat().st_size
    swap(folder / "train-000003.tar")
    with pytest.raises(InputError, match=r"train-00000[13]\.tar: sample"):
        StreamReader(open_shards(folder)).read(np.arange(17, 34))


def test_an_unknown_shard_is_named(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000009.tar")
    assert verify_shards(folder) == ["train-000009.tar is not in the manifest"]


@pytest.mark.parametrize("name", ["manifest.json", "index"])
def test_a_damaged_manifest_or_index(folder: Path, name: str) -> None:
    intact = (folder / name).read_bytes()
    for place in range(0, len(intact), max(1, len(intact) // 60)):
        flip(folder / name, place)
        try:
            with pytest.raises(InputError, match=name):
                open_shards(folder)
        finally:
            (folder / name).write_bytes(intact)


@pytest.mark.parametrize("name", ["manifest.json", "index"])
def test_a_missing_manifest_or_index(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        open_shards(folder)


def test_a_later_format_is_named(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text()) | {"format_version": 4}
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="format version 4"):
        open_shards(folder)


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    reader = StreamReader(open_shards(folder))
    cut(folder / "train-000005.tar")
    (folder / "train-000005.tar").write_bytes((folder / "train-000005.tar").read_bytes()[:600])
    with pytest.raises(InputError, match=r"train-000005\.tar"):
        reader.read(np.arange(85, 101))


def test_a_damaged_cache_is_decoded_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path / "cache"))
    opened, device = open_shards(folder), torch.device("cpu")
    first = load_resident(opened, None, device).read(np.arange(101))[0]
    (array,) = (tmp_path / "cache").glob("*.u8")
    flip(array, 5000)
    assert torch.equal(load_resident(opened, None, device).read(np.arange(101))[0], first)
