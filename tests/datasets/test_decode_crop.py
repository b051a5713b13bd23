"""What is decoded of a picture is what the whole picture would give, whichever way it is decoded."""

import io
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from shardstep.configs.errors import InputError
from shardstep.configs.schema import CropVersion
from shardstep.datasets import decode_crop as module
from shardstep.datasets import native
from shardstep.datasets.decode_crop import decode_crop, missing_for_partial
from shardstep.datasets.framing import DRAWS, Framing, Interpolation, RandomResizedCrop
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.scale import cut_and_scale
from tests.photographs import JPEG_KINDS, jpeg, picture

DRAWN = [None, *np.random.default_rng(0).random((6, DRAWS)).tolist()]
PARTLY_DECODED = set(JPEG_KINDS) - {"CMYK"}


def framing(version: CropVersion, size: int = 64, interpolation: Interpolation = "bilinear") -> Framing:
    shorter = int(size / 0.875)
    return Framing(size, size, (shorter, shorter), version, RandomResizedCrop(size, interpolation=interpolation))


def by_torchvision(data: bytes, frame: Framing, draws: list[float] | None) -> np.ndarray:
    """What torchvision makes of the whole picture as Pillow reads it, given the same box."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    mode, size = v2.InterpolationMode(frame.interpolation), [frame.height, frame.width]
    if draws is None:
        return np.array(functional.center_crop(functional.resize(image, [frame.cover[0]], mode), size))
    region = frame.crop(image.height, image.width, draws).region
    box = (region.top, region.left, region.height, region.width)
    return np.array(functional.resized_crop(image, *box, size, mode))


def test_it_is_compiled_here() -> None:
    assert missing_for_partial() is None  # the tests need a C compiler and libjpeg's header


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_every_kind_of_jpeg_is_near_to_torchvision(kind: str, interpolation: Interpolation) -> None:
    data = jpeg(picture(375, 500), **JPEG_KINDS[kind])
    largest: dict[CropVersion, float] = {2: 2, 3: 12}  # CMYK is one level off before it is scaled
    for version, most in largest.items():
        frame = framing(version, 64, interpolation)
        for draws in DRAWN:
            difference = np.abs(decode_crop(data, "RGB", frame, draws).astype(int) - by_torchvision(data, frame, draws))
            assert difference.mean() <= 1.0
            assert difference.max() <= most


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_every_size_is_read_alike_both_ways(kind: str) -> None:
    sizes = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 9), (8, 8), (16, 16), (17, 31), (31, 17), (33, 47), (40, 3), (3, 40)]
    for height, width in sizes:
        flat = np.full((height, width, 3), (200, 90, 40), dtype=np.uint8)
        for pixels, most in ((flat, 2), (picture(height, width), 60)):
            data = jpeg(pixels, **JPEG_KINDS[kind])
            for size in (1, 8, 24, 60):
                for draws in DRAWN:
                    shape = module.jpeg_shape(data)
                    assert shape is not None
                    assert shape[:2] == (height, width)
                    crop = framing(3, size).crop(height, width, draws)
                    found = np.empty((size, size, 3), dtype=np.uint8)
                    is_decoded = module._decode_part(data, crop, "bilinear", found)
                    assert is_decoded == (kind in PARTLY_DECODED)
                    if is_decoded:
                        whole = cut_and_scale(module.decode(data, "RGB"), crop, "bilinear").astype(int)
                        # colours of single pixels are spread over their neighbours where chroma has half the resolution
                        assert np.abs(found - whole).max() <= most, (height, width, size)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_modes(kind: str, mode: str) -> None:
    data = jpeg(picture(90, 70), **JPEG_KINDS[kind])
    part, whole = (decode_crop(data, mode, framing(version), DRAWN[1]) for version in (3, 2))
    assert part.shape == whole.shape == (64, 64, 3 if mode == "RGB" else 1)
    assert np.abs(part.astype(int) - whole).mean() <= 1.0


def test_files_of_other_formats_are_decoded_entirely() -> None:
    for extension in ("png", "webp", "bmp"):
        stream = io.BytesIO()
        Image.fromarray(picture(90, 70)).save(stream, extension)
        part, whole = (decode_crop(stream.getvalue(), "RGB", framing(version), DRAWN[1]) for version in (3, 2))
        assert np.array_equal(part, whole)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_jpeg_that_ends_early_is_refused(kind: str, version: CropVersion) -> None:
    data = jpeg(picture(375, 500), **JPEG_KINDS[kind])
    for share in (0.01, 0.3, 0.7, 0.95):
        for draws in DRAWN:  # also where the crop lies above the damage
            with pytest.raises(ValueError, match="not an image"):
                decode_crop(data[: int(share * len(data))], "RGB", framing(version), draws if version > 1 else None)


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_damage_is_an_error_or_pixels_and_never_a_crash(kind: str) -> None:
    data, draw = bytearray(jpeg(picture(90, 110), **JPEG_KINDS[kind])), np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        spoilt = data.copy()
        for place in draw.integers(2, len(data) - 2, 3):
            spoilt[place] = draw.integers(256)
        try:
            outcomes.add(decode_crop(bytes(spoilt), "RGB", framing(3, 16), DRAWN[1]).shape)
        except ValueError:
            outcomes.add(ValueError)
    assert outcomes <= {(16, 16, 3), ValueError}


def test_what_it_warns_of_is_left_to_the_decoder_of_whole_pictures() -> None:
    data = bytearray(jpeg(picture(90, 110)))
    data[-200:-100] = bytes(100)
    crop = framing(3).crop(90, 110)
    assert not module._decode_part(bytes(data), crop, "bilinear", np.empty((64, 64, 3), dtype=np.uint8))


def test_many_threads_decode_at_once() -> None:
    files = [jpeg(picture(60 + 40 * number, 500 - 40 * number, number)) for number in range(10)] * 8
    expected = [decode_crop(data, "RGB", framing(3), DRAWN[1]) for data in files]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: decode_crop(data, "RGB", framing(3), DRAWN[1]), files))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_memory_is_flat() -> None:
    data = jpeg(picture(375, 500))
    peaks = []
    for _ in range(3):
        for _ in range(150):
            decode_crop(data, "RGB", framing(3), DRAWN[1])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[2] - peaks[0] < 2000  # KiB; a leak of one plane would be 50 MB


def test_without_a_compiler_or_libjpeg_it_is_one_clear_line(
    shards: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.missing.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        message = r"data.crop_version=3 needs libjpeg's header and a C compiler \(there is no no-such-compiler\)"
        with pytest.raises(InputError, match=message):
            StreamReader(open_shards(f"{shards}/train"), framing(3))
        StreamReader(open_shards(f"{shards}/train"), framing(2))
    finally:
        native.missing.cache_clear()
