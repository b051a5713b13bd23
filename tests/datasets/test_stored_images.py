"""What shards hold of images: files as they are, others without loss as PNG, and all of them scaled down on request."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shardstep.configs.errors import InputError
from shardstep.datasets.decode import decode, extension_of
from shardstep.datasets.framing import Framing
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.scan import index_shards
from shardstep.datasets.stored_images import ImageOptions, stored_image
from shardstep.datasets.verify import verify_shards
from shardstep.datasets.write import write_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.shards import main as shards_command
from tests.datasets.test_tar import write_tar
from tests.image_kinds import coloured_kinds, grey_kinds, png, saved
from tests.photographs import picture

ALL_KINDS = {
    **{f"colour-{n}": k for n, k in coloured_kinds().items()},
    **{f"grey-{n}": k for n, k in grey_kinds().items()},
}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_kind_keeps_its_pixels(name: str) -> None:
    data = ALL_KINDS[name].data
    stored = stored_image(data, ImageOptions())
    kind = extension_of(data)
    if kind in ("png", "jpg", "webp", "avif"):
        assert (stored.data, stored.extension, stored.former) == (data, kind, None)
    else:
        assert (stored.extension, stored.former) == ("png", kind)
    pixels = decode(data, "UNCHANGED", "follow")
    assert np.array_equal(decode(stored.data, "UNCHANGED", "follow"), pixels)
    as_stored = stored_image(data, ImageOptions("ignore"))
    assert np.array_equal(decode(as_stored.data, "UNCHANGED", "ignore"), decode(data, "UNCHANGED", "ignore"))


def make_tree(folder: Path, files: dict[str, bytes]) -> Path:
    (folder / "train" / "c").mkdir(parents=True)
    for name, data in files.items():
        (folder / "train" / "c" / name).write_bytes(data)
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_set_of_every_format_is_read_by_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gc

    import webdataset

    image = Image.fromarray(picture(30, 40))
    names = {
        "a.JPG": "jpeg", "b.png": "png", "c.webp": "webp", "d.gif": "gif", "e.bmp": "bmp", "f.TIF": "tiff", "g.tiff": "tiff",
        "h.avif": "avif", "i.ppm": "ppm", "j.jp2": "jpeg2000", "k.png": "jpeg", "l.jpg": "png", "m.jpeg": "jpeg",
    }  # fmt: skip
    tree = make_tree(tmp_path / "tree", {name: saved(image, kind) for name, kind in names.items()})
    manifest = write_shards(str(tree), "train", tmp_path / "set")
    assert (manifest.samples, manifest.image_shape) == (13, [3, 30, 40])
    assert manifest.encodings == ["avif", "jpg", "png", "webp"]
    said = "stored in another format: 2 .tif as .png, 1 .bmp as .png, 1 .gif as .png"
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("stored"))
    assert sorted(line.split(": ")[1].removesuffix(" (of 13 images)").split(", ")) == sorted(
        [*said.split(": ")[1].split(", "), "1 .jp2 as .png", "1 .pnm as .png"]
    )
    read = list(webdataset.WebDataset(str(tmp_path / "set" / "train-000000.tar"), shardshuffle=False))
    gc.collect()  # webdataset leaves its files to the collector, which warns: here, and not in another test
    kinds = sorted(next(iter(sample.keys() - {"__key__", "__url__", "__local_path__", "cls"})) for sample in read)
    assert kinds == ["avif", "jpeg", "jpg", "jpg"] + ["png"] * 8 + ["webp"]
    assert verify_shards(tmp_path / "set") == []


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize(("height", "width"), [(100, 150), (150, 100), (64, 64), (101, 333), (40, 90)])
def test_the_shorter_side_is_scaled_down(turn: int, height: int, width: int) -> None:
    image, exif = Image.fromarray(picture(height, width)), Image.Exif()
    exif[0x0112] = turn
    options = ImageOptions(resize=48, quality=95)
    for kind, extension in (("png", "png"), ("jpeg", "jpg"), ("webp", "jpg"), ("avif", "jpg"), ("tiff", "png")):
        data = saved(image, kind, exif=exif)
        stored = stored_image(data, options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        shorter = min(upright.size)
        if shorter <= 48:
            assert np.array_equal(decode(stored.data, "RGB", "follow").shape[:2], upright.size[::-1])
            assert turn == 6 or stored.data == data or kind == "tiff"
        else:
            size = (upright.width * 48 // shorter, upright.height * 48 // shorter)
            wanted = np.array(upright.resize(size, Image.Resampling.BILINEAR)).astype(int)
            found = decode(stored.data, "RGB", "ignore")  # upright without any turn
            assert stored.extension == extension
            assert found.shape == wanted.shape
            assert np.abs(found - wanted).mean() < (1 if extension == "png" else 3)
        if turn == 6:
            assert np.array_equal(decode(stored.data, "RGB", "ignore"), decode(stored.data, "RGB", "follow"))
        assert stored_image(data, options) == stored  # same input, same bytes


def test_a_quality_is_that_of_jpegs() -> None:
    data = saved(Image.fromarray(picture(200, 200)), "jpeg", quality=98)
    sizes = [len(stored_image(data, ImageOptions(resize=100, quality=quality)).data) for quality in (30, 60, None, 98)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    grey = stored_image(saved(Image.fromarray(picture(200, 200)[:, :, 0]), "jpeg"), ImageOptions(resize=100))
    assert decode(grey.data, "UNCHANGED").shape == (100, 100, 1)


def test_the_command_shrinks_while_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{n}.jpg": saved(Image.fromarray(picture(100 + n, 150, n)), "jpeg") for n in range(6)}
    tree = make_tree(tmp_path / "tree", files)
    command = ["write", "--source", str(tree), "--resize", "32", "--quality", "80", "--out"]
    for name in ("set", "again"):
        assert run_command(shards_command, [*command, str(tmp_path / name)]) == 0
    shards = open_shards(tmp_path / "set")
    assert shards.manifest.fingerprint == open_shards(tmp_path / "again").manifest.fingerprint
    assert {key: shards.manifest.made[key] for key in ("orientation", "resize", "quality")} == {
        "orientation": "follow",
        "resize": 32,
        "quality": 80,
    }
    heights = sorted(100 + n for n in range(6))
    assert sorted({shards.size_of(n) for n in range(6)}) == sorted({(32, 150 * 32 // height) for height in heights})
    capsys.readouterr()
    assert run_command(shards_command, ["info", str(tmp_path / "set")]) == 0
    assert "32 to 32 pixels high, 45 to 48 wide" in capsys.readouterr().out
    for wrong, message in (
        (["--quality", "80"], "a quality of 80 is for images that are scaled"),
        (["--resize", "0"], "a shorter side of 0 pixels"),
        (["--resize", "9", "--quality", "101"], "a quality of 101"),
    ):
        out = tmp_path / "none"
        assert run_command(shards_command, ["write", "--source", str(tree), *wrong, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_sizes_are_in_the_index_where_they_differ(tmp_path: Path) -> None:
    files = {f"{n}.png": png(picture(20 + n, 30), 2) for n in range(5)}
    write_shards(str(make_tree(tmp_path / "tree", files)), "train", tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    assert shards.manifest.format_version == 3
    reader = StreamReader(shards, Framing.covering(8, 8, 2))
    for sample in range(5):
        assert shards.size_of(sample) == decode(reader.read_bytes(sample), "RGB").shape[:2]
    path = tmp_path / "set" / "index-sizes"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(InputError, match="index-sizes is damaged"):
        open_shards(tmp_path / "set")
    assert any("index-sizes" in problem for problem in verify_shards(tmp_path / "set"))
    path.unlink()
    with pytest.raises(InputError, match="index-sizes is missing"):
        open_shards(tmp_path / "set")


@pytest.mark.parametrize(
    ("members", "encodings", "left_out"),
    [
        (["1.tif", "1.cls", "2.tif", "2.cls"], ["tif"], None),
        (["1.gif", "1.cls", "2.jpg", "2.cls"], ["gif", "jpg"], None),
        (["1.png", "1.tif", "1.cls"], ["png"], "1 .tif file (a.tar: 1.tif)"),
        (["1.tif", "1.png", "1.cls"], ["png"], "1 .tif file (a.tar: 1.tif)"),
        (["1.png", "1.cls", "1.depth.tif"], ["png"], "1 .tif file (a.tar: 1.depth.tif)"),
        (["1.png", "1.cls", "2.avif"], ["png"], "1 .avif file (a.tar: 2.avif)"),
        (["1.bmp", "1.gif", "1.cls"], ["bmp"], "1 .gif file (a.tar: 1.gif)"),
    ],
)
def test_rarer_formats_in_tars_of_others_are_images_where_a_sample_has_no_other(
    tmp_path: Path, members: list[str], encodings: list[str], left_out: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"tif": "tiff", "jpg": "jpeg"}
    image = Image.fromarray(picture(20, 30))
    content = {
        name: b"0" if name.endswith("cls") else saved(image, kinds.get(name[-3:], name.rpartition(".")[2]))
        for name in members
    }
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", content)
    manifest = index_shards(tmp_path / "set", {})
    assert (manifest.samples, manifest.encodings) == (sum(name.endswith("cls") for name in members), encodings)
    err = capsys.readouterr().err
    assert (left_out in err) if left_out else ("left out" not in err)
