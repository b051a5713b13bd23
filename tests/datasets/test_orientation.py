"""Pictures that a camera has turned: every value of every format, upright or as stored, by every caller."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from shardstep.configs.errors import InputError
from shardstep.configs.schema import CropVersion, DataConfig, Orientation
from shardstep.datasets.decode import decode
from shardstep.datasets.decode_crop import decode_crop
from shardstep.datasets.framing import DRAWS, Box, Framing, RandomResizedCrop
from shardstep.datasets.image_files import read_image_file
from shardstep.datasets.manifest import ShardFolder, open_shards
from shardstep.datasets.orientation import UPRIGHT, turn_of
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.resident import load_resident
from shardstep.datasets.scale import cut_and_scale
from shardstep.datasets.stored_images import ImageOptions
from shardstep.datasets.verify import undecodable_images, verify_shards
from shardstep.datasets.write import write_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.evaluate import main as evaluate_command
from shardstep.launch.predict import main as predict_command
from shardstep.launch.shards import main as shards_command
from shardstep.trainer.data import make_missing_data, open_parts
from tests.image_kinds import png, saved
from tests.photographs import picture as smooth
from tests.runs import train_ranks, write_recipe

VALUES = range(1, 9)
FORMATS = {
    "jpeg": {},
    "png": {},
    "webp": {"lossless": True, "exact": True},
    "tiff": {},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
    "mpo": {},
}
SMALL = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def turned(image: Image.Image, extension: str, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = value, "a camera"
    return saved(image, extension, exif=exif, **FORMATS[extension])


def upright(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_of_every_format_is_turned_as_by_pillow(extension: str, value: int) -> None:
    data = turned(Image.fromarray(SMALL), extension, value)
    assert (turn_of(data) == UPRIGHT) == (value == 1)
    for mode in ("RGB", "L"):
        expected = upright(data, mode)
        found = decode(data, mode, "follow")
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 2, mode  # of the decoders of JPEG
        assert decode(data, mode, "ignore").shape[:2] == (6, 10)
    assert np.array_equal(decode(data, "UNCHANGED", "follow"), decode(data, "RGB", "follow"))
    grey = turned(Image.fromarray(SMALL[:, :, 0]), extension, value)
    assert np.abs(decode(grey, "UNCHANGED", "follow").astype(int) - upright(grey, "L")).max() <= 2


TURNED = turned(Image.fromarray(SMALL), "jpeg", 6)
EXIF = TURNED.index(b"Exif")
WITHOUT = saved(Image.fromarray(SMALL), "jpeg")
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        WITHOUT,
        turned(Image.fromarray(SMALL), "jpeg", 0),
        turned(Image.fromarray(SMALL), "jpeg", 9),
        TURNED[: EXIF + 6] + bytes(len(TURNED[EXIF + 6 : EXIF + 40])) + TURNED[EXIF + 40 :],
        TURNED[: EXIF + 8],
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"",
        b"RIFF0000WEBPVP8X",
        b"\0\0\0\x18ftypavif",
        b"II*\0",
        png(SMALL, 2, 8, (b"eXIf", b"nonsense")),
        png(SMALL, 2, 8, (b"tEXt", b"Comment\0eXIf")),
    ],
)
def test_without_an_orientation_that_can_be_read_a_picture_is_upright(data: bytes) -> None:
    assert turn_of(data) == UPRIGHT


@pytest.mark.parametrize(
    "data",
    [
        WITHOUT[:2] + b"\xff\xfe\0\x04ab" + TURNED[2:],  # a comment before EXIF
        WITHOUT[:2] + b"\xff" + TURNED[2:],  # a fill byte before the marker
        saved(Image.fromarray(SMALL), "jpeg", xmp=XMP),
        saved(Image.fromarray(SMALL), "webp", lossless=True, xmp=XMP),
        saved(Image.fromarray(SMALL), "png", exif=b"Exif\0\0" + TURNED[EXIF + 6 : EXIF + 60]),
    ],
)
def test_wherever_an_orientation_is_said(data: bytes) -> None:
    assert np.abs(decode(data, "RGB", "follow").astype(int) - upright(data)).max() <= 2
    assert decode(data, "RGB", "follow").shape == (10, 6, 3)


def frames(version: CropVersion) -> list[Framing]:
    found = [Framing.covering(40, 40, version), Framing(32, 24, (48, 40), version)]
    return found + ([Framing(40, 40, (46, 46), version, RandomResizedCrop(40))] if version > 1 else [])


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_crop_is_one_of_the_upright_picture(version: CropVersion, progressive: bool) -> None:
    draws = np.random.default_rng(5).random((3, DRAWS)).tolist()
    image = Image.fromarray(smooth(100, 150))
    for value in VALUES:
        exif = Image.Exif()
        exif[0x0112] = value
        data = saved(image, "jpeg", exif=exif, progressive=progressive)
        picture = saved(Image.fromarray(decode(data, "RGB", "follow")), "png")
        for framing in frames(version):
            for drawn in [None, *draws] if framing.random else [None]:
                found = decode_crop(data, "RGB", framing, drawn, orientation="follow")
                wanted = decode_crop(picture, "RGB", framing, drawn)
                assert found.shape == wanted.shape
                difference = np.abs(found.astype(int) - wanted)
                if version < 3:
                    assert not difference.any()
                else:  # version 3 scales colours as they are stored: see docs/data.md
                    assert difference.mean() < 2.5, (value, framing)


def test_boxes_are_turned_with_their_picture() -> None:
    picture = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    for value in VALUES:
        data = turned(Image.fromarray(picture), "png", value)
        turn, whole = turn_of(data), decode(data, "RGB", "follow")
        height, width = whole.shape[:2]
        for box in (Box(1, 2, 3, 4), Box(0, 0, 1, 2), Box(height - 2, width - 3, 2, 3)):
            crop = Framing.covering(height, width, 2).crop(height, width)
            crop = type(crop)(Box(0, 0, height, width), (height, width), box)
            part = cut_and_scale(decode(data, "RGB"), turn.stored_crop(crop, height, width), "bilinear")
            assert np.array_equal(
                turn.pixels(part), whole[box.top : box.top + box.height, box.left : box.left + box.width]
            )


def make_tree(folder: Path, size: tuple[int, int] = (40, 60), values: tuple[int, ...] = tuple(VALUES)) -> Path:
    """Write train/c/<value>.<format>, a picture with each orientation in each format."""
    (folder / "train" / "c").mkdir(parents=True)
    image = Image.fromarray(smooth(*size))
    for extension in ("jpeg", "png", "webp", "tiff", "avif"):
        for value in values:
            (folder / "train" / "c" / f"{extension}{value}.{extension}").write_bytes(turned(image, extension, value))
    return folder


def read_every_way(shards: ShardFolder, framing: Framing | None) -> np.ndarray:
    ids = np.arange(shards.manifest.samples)
    streamed = StreamReader(shards, framing).read(ids)[0]
    assert torch.equal(load_resident(shards, framing, torch.device("cpu")).read(ids)[0], streamed)
    assert (verify_shards(shards.path), undecodable_images(shards)) == ([], [])
    return streamed.numpy()


@pytest.mark.parametrize("orientation", ["follow", "ignore"])
def test_sets_are_read_as_they_were_written(tmp_path: Path, orientation: Orientation) -> None:
    tree = make_tree(tmp_path / "tree")
    write_shards(str(tree), "train", tmp_path / "set", options=ImageOptions(orientation))
    shards = open_shards(tmp_path / "set")
    manifest = shards.manifest
    assert (manifest.orientation, manifest.made["orientation"]) == (orientation, orientation)
    # TIFF becomes PNG, whose pixels are upright then: four formats with seven values other than 1 are turned
    assert manifest.made.get("turned") == (28 if orientation == "follow" else None)
    assert manifest.format_version == (3 if orientation == "follow" else 1)
    framing = Framing.covering(24, 24, 2)
    found = read_every_way(shards, framing)
    reader = StreamReader(shards, framing)
    for row in range(manifest.samples):
        picture = decode(reader.read_bytes(row), "RGB", orientation)
        assert shards.size_of(row) == picture.shape[:2]
        assert np.array_equal(found[row], decode_crop(saved(Image.fromarray(picture), "png"), "RGB", framing))
    if orientation == "ignore":
        assert manifest.image_shape == [3, 40, 60]
    else:
        assert sorted({shards.size_of(row) for row in range(40)}) == [
            (40, 60),
            (60, 40),
        ]  # values from 5 on exchange sides


def test_the_statistics_are_those_of_upright_pictures(tmp_path: Path) -> None:
    write_shards(str(make_tree(tmp_path / "tree", values=(5, 6, 7, 8))), "train", tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    assert shards.manifest.image_shape == [3, 60, 40]
    pixels = read_every_way(shards, None)
    assert shards.manifest.mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)).tolist(), abs=1e-6)


def test_sets_of_earlier_versions_stay_as_they_were(tmp_path: Path) -> None:
    write_shards(str(make_tree(tmp_path / "tree")), "train", tmp_path / "set", options=ImageOptions("ignore"))
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    assert content["made"].pop("orientation") == "ignore"
    path.unlink()
    # An earlier version wrote the same manifest without the key: `shards index --force` keeps what it finds
    from shardstep.datasets.scan import index_shards

    before = index_shards(tmp_path / "set", content["made"], classes=["c"])
    assert (before.orientation, before.format_version, before.image_shape) == ("ignore", 1, [3, 40, 60])
    assert run_command(shards_command, ["index", str(tmp_path / "set"), "--force"]) == 0
    assert open_shards(tmp_path / "set").manifest.orientation == "ignore"
    assert run_command(shards_command, ["index", str(tmp_path / "set"), "--force", "--orientation", "follow"]) == 0
    assert open_shards(tmp_path / "set").manifest.image_shape is None


def test_files_are_read_as_in_the_set_of_a_run(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    framing = Framing.covering(24, 24, 2)
    for path in (tree / "train" / "c").iterdir():
        for orientation in ("follow", "ignore"):
            picture = saved(Image.fromarray(decode(path.read_bytes(), "RGB", orientation)), "png")  # type: ignore[arg-type]
            found = read_image_file(path, "RGB", framing, orientation)  # type: ignore[arg-type]
            assert np.array_equal(found, decode_crop(picture, "RGB", framing))


def test_a_run_predicts_and_evaluates_upright_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    for number in range(12):  # red above green, or green above red, as a camera that is held upright stores them
        picture = np.zeros((24, 40, 3), dtype=np.uint8)
        picture[:, :20, number % 2], picture[:, 20:, 1 - number % 2] = 250, 250
        path = tree / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(turned(Image.fromarray(picture), "jpeg", 6))
    write_shards(str(tree), "train", tmp_path / "train")
    recipe = write_recipe(tmp_path, tmp_path, data={"test": str(tmp_path / "train"), "resize": 24})
    train_ranks(1, recipe, "train.duration=20 steps", "train.global_batch_size=12")
    assert evaluate_command([str(tmp_path / "run")]) == 0
    accuracy = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]
    photo = (tree / "train" / "1" / "1.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(photo)
    (tmp_path / "upright.png").write_bytes(saved(Image.fromarray(decode(photo, "RGB", "follow")), "png"))
    (tmp_path / "stored.png").write_bytes(saved(Image.fromarray(decode(photo, "RGB", "ignore")), "png"))
    files = [str(tmp_path / name) for name in ("photo.jpg", "upright.png", "stored.png")]
    assert predict_command([str(tmp_path / "run"), *files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["confidence"] == pytest.approx(lines[1]["confidence"], abs=0.02)  # of crop version 3
    assert lines[0]["confidence"] != pytest.approx(lines[2]["confidence"], abs=0.02)
    assert (accuracy, lines[0]["prediction"]) == (1.0, "1")


def test_a_recipe_writes_upright_sets_or_not_and_keeps_to_them(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    for orientation, expected in (("auto", "follow"), ("follow", "follow"), ("ignore", "ignore")):
        folder = str(tmp_path / orientation)
        config = DataConfig(
            train=folder, test="none", source=str(tmp_path / "tree"), validation=0.5, orientation=orientation, resize=24
        )
        make_missing_data(config)
        assert open_parts(config).train.manifest.orientation == expected
        assert open_parts(replace(config, orientation="auto")).train.manifest.orientation == expected
        other = "ignore" if expected == "follow" else "follow"
        with pytest.raises(InputError, match=f"data.orientation={other}, but {folder} was written with {expected}"):
            open_parts(replace(config, orientation=other))
