"""Image files of any kind to pixels of one shape."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.schema import CropVersion
from shardstep.datasets.decode import resize_to_cover
from shardstep.datasets.framing import Framing
from shardstep.datasets.image_files import find_image_files, read_image_file

RED = (200, 40, 40)
KINDS = {
    "rgb.png": "RGB",
    "rgba.png": "RGBA",
    "palette.png": "P",
    "grey.png": "L",
    "grey_alpha.png": "LA",
    "one_bit.png": "1",
    "rgb.jpg": "RGB",
    "cmyk.jpg": "CMYK",
    "rgb.webp": "RGB",
    "rgb.bmp": "RGB",
    "palette.gif": "P",
    "rgb.tif": "RGB",
}


def write_image(path: Path, kind: str, size: tuple[int, int] = (50, 30)) -> Path:
    Image.new("RGB", size, RED).convert(kind).save(path)
    return path


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_the_shape_of_the_data(name: str, mode: str, version: CropVersion, tmp_path: Path) -> None:
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = read_image_file(
        write_image(tmp_path / name, KINDS[name]), mode, Framing.covering(16, 16, version), "ignore"
    )
    assert (pixels.shape, pixels.dtype) == ((16, 16, channels), np.uint8)
    if mode == "RGB" and KINDS[name] in ("RGB", "RGBA", "CMYK"):
        assert pixels.mean(axis=(0, 1)) == pytest.approx(RED, abs=4)  # red stays red


def test_what_is_no_image_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(stream, "png")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:600])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "empty.png", "text.jpg"):
        with pytest.raises(ValueError, match="not an image that can be decoded"):
            read_image_file(tmp_path / name, "RGB", Framing.covering(8, 8, 3), "ignore")
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\)"):
        read_image_file(tmp_path / "nowhere.png", "RGB", Framing.covering(8, 8, 2), "ignore")
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(ValueError, match=r"cannot be read \(not a regular file\)"):
        read_image_file(tmp_path / "fifo.png", "RGB", Framing.covering(8, 8, 2), "ignore")
    assert capfd.readouterr().err == ""  # the decoder keeps its own words to itself


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/c.jpeg", "a/notes.txt", "a/._c.jpeg", ".cache/d.png", "__MACOSX/e.png", "x.png/f.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    images, line = find_image_files(tmp_path)
    expected = ["a/c.jpeg", "b.PNG", "elsewhere/f.tiff", "x.png/f.tiff"]
    assert [str(path.relative_to(tmp_path)) for path in images] == expected
    assert line is not None
    assert line.startswith(
        f"left out of {tmp_path}: 2 hidden folders (.cache, ...), 1 hidden file (a/._c.jpeg), "
        "1 .txt file (a/notes.txt), 1 circular link (a/up); used are files that end in png, "
    )
    assert find_image_files(tmp_path / "a/notes.txt") == ([tmp_path / "a/notes.txt"], None)  # named: tried
    with pytest.raises(ValueError, match="does not exist"):
        find_image_files(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        find_image_files(tmp_path / "none")


def test_fill_covers_the_frame_and_keeps_the_centre() -> None:
    # 4 high, 12 wide, into 4x4: nothing is scaled, columns 4 to 7 are the centre
    columns = np.arange(12, dtype=np.uint8)[None, :, None].repeat(4, axis=0)
    assert resize_to_cover(columns, 4, 4)[0, :, 0].tolist() == [4, 5, 6, 7]
    # 8 high, 4 wide, into 2 high, 2 wide: halved by areas to 4 high, rows 1 and 2 are the centre
    rows = np.array([0, 0, 10, 20, 30, 40, 0, 0], dtype=np.uint8)[:, None, None].repeat(4, axis=1)
    assert resize_to_cover(rows, 2, 2)[:, 0, 0].tolist() == [15, 35]
    assert resize_to_cover(columns, 2, 6).shape == (2, 6, 1)
