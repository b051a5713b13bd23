"""Every kind of image file, by every caller of the decoder: the same pixels, or the same refusal."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shardstep.configs.errors import InputError
from shardstep.configs.schema import CropVersion
from shardstep.datasets.decode import decode, to_grey
from shardstep.datasets.framing import Framing
from shardstep.datasets.image_files import read_image_file
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.resident import load_resident
from shardstep.datasets.scan import index_shards
from shardstep.datasets.verify import undecodable_images, verify_shards
from shardstep.datasets.write import write_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.shards import main as shards_command
from tests.image_kinds import HEIGHT, WIDTH, Kind, coloured_kinds, grey_kinds, refused_kinds, saved

KINDS = {
    **{f"colour-{name}": kind for name, kind in coloured_kinds().items()},
    **{f"grey-{name}": kind for name, kind in grey_kinds().items()},
}
REFUSED = refused_kinds()


def expected(kind: Kind, mode: str) -> np.ndarray:
    """Convert by Pillow, to (H, W, 1 or 3)."""
    pixels = np.array(Image.fromarray(kind.pixels).convert(mode))
    return pixels.reshape(HEIGHT, WIDTH, -1)


def write_set(folder: Path, kinds: dict[str, bytes]) -> Path:
    """Write a tar that holds one image of each kind, in order, all named .png: the name decides nothing."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, data in enumerate(kinds.values()):
            for name, content in ((f"{number:03d}.png", data), (f"{number:03d}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def check(found: np.ndarray, kind: Kind, mode: str, what: str) -> None:
    wanted = expected(kind, mode)
    assert (found.shape, found.dtype) == (wanted.shape, np.uint8), what
    difference = int(np.abs(found.astype(int) - wanted).max())
    assert difference <= kind.tolerance, what


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_it_is_stored(name: str) -> None:
    kind = KINDS[name]
    for mode in ("RGB", "L"):
        check(decode(kind.data, mode), kind, mode, mode)
    own_mode = "RGB" if kind.pixels.ndim == 3 else "L"
    assert np.array_equal(decode(kind.data, "UNCHANGED"), decode(kind.data, own_mode))


@pytest.mark.parametrize(("start", "own_mode"), [("colour", "RGB"), ("grey", "L"), ("", "RGB")])
@pytest.mark.parametrize("read_mode", ["RGB", "L"])
def test_training_reads_what_indexing_counted(start: str, own_mode: str, read_mode: str, tmp_path: Path) -> None:
    kinds = {name: kind for name, kind in KINDS.items() if name.startswith(start)}
    folder = write_set(tmp_path / "set", {name: kind.data for name, kind in kinds.items()})
    manifest = index_shards(folder, {})
    assert (manifest.image_mode, manifest.image_shape) == (own_mode, [3 if own_mode == "RGB" else 1, HEIGHT, WIDTH])
    shards, ids, cpu = open_shards(folder), np.arange(len(kinds)), torch.device("cpu")
    assert (verify_shards(folder), undecodable_images(shards)) == ([], [])
    streamed = StreamReader(shards, None, read_mode).read(ids)[0].numpy()
    for name, found in zip(kinds, streamed, strict=True):
        check(found, kinds[name], read_mode, name)
    assert np.array_equal(load_resident(shards, None, cpu, read_mode).read(ids)[0].numpy(), streamed)
    counted = StreamReader(shards).read(ids)[0].double().flatten(0, 2) / 255
    assert manifest.mean == pytest.approx(counted.mean(dim=0).tolist(), abs=1e-6)
    assert manifest.std == pytest.approx(counted.std(dim=0, correction=0).tolist(), abs=1e-6)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_are_read_as_in_a_set(mode: str, version: CropVersion, tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(kind.data)
        check(read_image_file(path, mode, Framing.covering(HEIGHT, WIDTH, version), "ignore"), kind, mode, name)


def test_writing_takes_every_kind(tmp_path: Path) -> None:
    (tmp_path / "tree" / "c").mkdir(parents=True)
    for name, kind in KINDS.items():
        (tmp_path / "tree" / "c" / f"{name}.png").write_bytes(kind.data)
    assert write_shards(str(tmp_path / "tree"), "train", tmp_path / "set").samples == len(KINDS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_all(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, message = REFUSED[name]
    (tmp_path / "tree" / "c").mkdir(parents=True)
    path = tmp_path / "tree" / "c" / "0.png"
    path.write_bytes(data)
    callers: list[Callable[[], object]] = [
        *(lambda mode=mode: decode(data, mode) for mode in ("RGB", "L", "UNCHANGED")),  # type: ignore[misc]
        lambda: read_image_file(path, "RGB", Framing.covering(HEIGHT, WIDTH, 3), "ignore"),
        lambda: write_shards(str(tmp_path / "tree"), "train", tmp_path / "out"),
        lambda: index_shards(write_set(tmp_path / "set", {name: data}), {}),
    ]
    for caller in callers:
        with pytest.raises(ValueError, match=message) as raised:
            caller()
        assert "object at" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert "Warning" not in capfd.readouterr().err


def test_a_set_that_this_machine_cannot_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set", {name: KINDS[name].data for name in ("colour-avif", "colour-png")})
    index_shards(folder, {})
    from PIL import AvifImagePlugin

    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)  # a Pillow that was built without it
    assert run_command(shards_command, ["verify", str(folder)]) == 2
    message = f"{folder} is as it was written, but training cannot read all of it: a.tar: sample 000: not an image"
    assert capsys.readouterr().err.startswith(f"error: {message}")
    with pytest.raises(InputError, match="sample 000: not an image that can be decoded"):
        StreamReader(open_shards(folder)).read(np.arange(2))


def test_grey_is_pillows() -> None:
    levels = np.arange(0, 256, 3, dtype=np.uint8)  # 86 levels: 636,056 colours
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(levels.size, -1, 3)
    assert np.array_equal(to_grey(colours)[:, :, 0], np.array(Image.fromarray(colours).convert("L")))


def test_a_picture_that_is_larger_than_pillow_likes() -> None:
    # Pillow warns from 89 million pixels and refuses twice as many, OpenCV refuses 2**30: here 180 million, of one bit
    data = saved(Image.new("1", (18_000, 10_000)), "tiff", compression="group4")
    assert decode(data, "L").shape == (10_000, 18_000, 1)
