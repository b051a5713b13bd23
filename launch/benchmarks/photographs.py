"""Loaders of photographs: what training and evaluation read of synthetic JPEGs of ImageNet's size, beside other libraries.

`shardstep bench loader --images photos` prints it. Every work ends with uint8 pixels of 224x224, flipped in training.
"""

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardstep.configs.cores import usable_cores
from shardstep.launch.benchmarks.bench_tables import Table, in_turn, per_second

if TYPE_CHECKING:
    import numpy as np

    from shardstep.configs.schema import CropVersion
    from shardstep.datasets.framing import Framing
    from shardstep.datasets.manifest import ShardFolder

_HEIGHT, _WIDTH = 375, 500
_SIZE, _SHORTER = 224, 256
_BATCH = 32
_COMPARED = 40  # images whose pixels are compared with Pillow's
_OPENCV = "OpenCV: the whole picture, cropped, linear"
_FLIP = 0.5

Drawn = list[list[float]] | list[None]
"""For each image the numbers of its random crop; None for the centre."""
Decoder = Callable[[bytes, Sequence[float] | None], Any]
"""The bytes of a file and the numbers of its crop to uint8 pixels (height, width, 3)."""


def measure_photographs(args: argparse.Namespace, folder: Path) -> Iterator[Table]:
    """Measure a table each for training and evaluation on one core, and one for two threads where there are two cores."""
    import numpy as np
    import torch

    from shardstep.datasets.framing import DRAWS

    torch.set_num_threads(1)
    shards = write_photographs(args.jpegs, folder)
    drawn = np.random.default_rng(0).random((args.jpegs, DRAWS)).tolist()
    yield _one_core(shards, drawn, args.repeats)
    yield _one_core(shards, [None] * args.jpegs, args.repeats)
    if usable_cores().count > 1:
        yield _two_threads(shards, drawn, args.repeats)


def write_photographs(count: int, folder: Path) -> "ShardFolder":
    """Write shards of synthetic photographs: 500x375, 4:2:0, quality 90, about 70 KB.

    As in photographs, amplitudes fall with the frequency, edges are sharp, and colours vary less than brightness.
    """
    import cv2
    import numpy as np

    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.write import write_shards

    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_HEIGHT)[:, np.newaxis], np.fft.rfftfreq(_WIDTH))
    frequency[0, 0] = np.inf

    def noise(power: float) -> "np.ndarray":
        spectrum = np.fft.rfft2(draw.normal(size=(_HEIGHT, _WIDTH))) / frequency**power
        values = np.fft.irfft2(spectrum, s=(_HEIGHT, _WIDTH))
        return values / values.std()

    for number in range(count):
        luma = 115 + 40 * noise(1.28)
        for _ in range(12):
            inside = np.zeros((_HEIGHT, _WIDTH), dtype=np.uint8)
            centre, axes = draw.integers((_WIDTH, _HEIGHT)).tolist(), draw.integers(10, 90, 2).tolist()
            cv2.ellipse(inside, centre, axes, draw.uniform(0, 180), 0, 360, 1, -1)
            luma += draw.uniform(-60, 60) * inside
        channels = np.dstack([luma, 128 + 18 * noise(1.8), 128 + 18 * noise(1.8)])
        pixels = cv2.cvtColor(channels.clip(0, 255).astype(np.uint8), cv2.COLOR_YCrCb2BGR)
        path = folder / "photographs" / "train" / "any" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    write_shards(str(folder / "photographs"), "train", folder / "shards", samples_per_shard=100)
    return open_shards(folder / "shards")


def _one_core(shards: "ShardFolder", drawn: Drawn, repeats: int) -> Table:
    from shardstep.datasets.decode_crop import missing_for_partial
    from shardstep.datasets.reader import StreamReader

    reader, is_random = StreamReader(shards), drawn[0] is not None
    files = [reader.read_bytes(sample) for sample in range(shards.manifest.samples)]
    decoders: dict[str, Decoder] = {_OPENCV: _by_opencv, "shardstep: the whole picture, antialiased": _decoder(2)}
    lacks = missing_for_partial()
    if not lacks:
        decoders["shardstep: only the crop, antialiased"] = _decoder(3)
    works = {name: _in_memory(files, drawn, decoder) for name, decoder in decoders.items()}
    works[f"{list(works)[-1]}; index, pread, crc32"] = _streamed(shards, 2 if lacks else 3, is_random)
    works["torchvision ImageFolder + DataLoader"] = _image_folder(shards, is_random)
    works["webdataset, torchvision transforms, DataLoader"] = _webdataset(shards, is_random)
    values = in_turn({name: per_second(work, "cpu") for name, work in works.items()}, repeats)
    notes = [f"decoding only the crop is left out: it needs {lacks}"] if lacks else []
    notes += [f"{name}: {_difference(files, drawn, decoder)}" for name, decoder in decoders.items()]
    kind = f"RandomResizedCrop({_SIZE}) and flip" if is_random else f"Resize({_SHORTER}) and CenterCrop({_SIZE})"
    kilobytes = sum(map(len, files)) / len(files) / 1000
    title = f"{kind} of {len(files):,} JPEGs of {_WIDTH}x{_HEIGHT}, {kilobytes:.0f} KB, one core, cpu time"
    return Table(title, "images/s", values, _OPENCV, notes)


def _two_threads(shards: "ShardFolder", drawn: Drawn, repeats: int) -> Table:
    from shardstep.datasets.decode_crop import missing_for_partial

    def by(threads: int) -> Callable[[], int]:
        read = [
            _streamed(shards, version, is_random=True, part=slice(number, None, threads)) for number in range(threads)
        ]
        pool = ThreadPoolExecutor(threads)
        return lambda: sum(pool.map(lambda work: work(), read))

    version: CropVersion = 2 if missing_for_partial() else 3
    works = {"one thread": by(1), "two threads": by(2)}
    values = in_turn({name: per_second(work) for name, work in works.items()}, repeats)
    return Table("the same random crops from shards, wall time", "images/s", values, "one thread")


def _framing(version: "CropVersion") -> "Framing":
    from shardstep.datasets.framing import Framing, RandomResizedCrop

    return Framing(_SIZE, _SIZE, (_SHORTER, _SHORTER), version, RandomResizedCrop(_SIZE))


def _decoder(version: "CropVersion") -> Decoder:
    from shardstep.datasets.decode_crop import decode_crop

    framing = _framing(version)
    return lambda data, draws: decode_crop(data, "RGB", framing, draws)


def _by_opencv(data: bytes, draws: Sequence[float] | None) -> "np.ndarray":
    """Decode the whole picture and scale the crop without antialiasing: the plain way that is fastest."""
    import cv2
    import numpy as np

    pixels = np.asarray(cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB))
    crop = _framing(2).crop(pixels.shape[0], pixels.shape[1], draws)
    region, (height, width), window = crop.region, crop.scaled, crop.window
    pixels = pixels[region.top : region.top + region.height, region.left : region.left + region.width]
    scaled = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return scaled[window.top : window.top + window.height, window.left : window.left + window.width]


def _in_memory(files: list[bytes], drawn: Drawn, decoder: Decoder) -> Callable[[], int]:
    """Return a work: decode files into batches, and mirror half of the random crops."""
    import numpy as np

    def work() -> int:
        for start in range(0, len(files), _BATCH):
            chosen = range(start, min(start + _BATCH, len(files)))
            batch = np.empty((len(chosen), _SIZE, _SIZE, 3), dtype=np.uint8)
            for row, number in enumerate(chosen):
                draws = drawn[number]
                pixels = decoder(files[number], draws)
                batch[row] = pixels[:, ::-1] if draws and draws[0] < _FLIP else pixels
        return len(files)

    return work


def _streamed(
    shards: "ShardFolder", version: "CropVersion", is_random: bool, part: slice = slice(None)
) -> Callable[[], int]:
    """Return a work: read shards (or the samples of a part of them) as training or evaluation does."""
    import numpy as np
    import torch

    from shardstep.datasets.augment import flip
    from shardstep.datasets.reader import StreamReader
    from shardstep.datasets.rng import AT_DECODING, Draws

    reader = StreamReader(shards, _framing(version))
    ids = np.random.default_rng(0).permutation(shards.manifest.samples)[part]

    def work() -> int:
        for start in range(0, len(ids), _BATCH):
            chosen = ids[start : start + _BATCH]
            if is_random:
                keys = torch.arange(start, start + len(chosen)), torch.from_numpy(chosen)
                images, _ = reader.read(chosen, Draws(0, 0, *keys, stream=AT_DECODING))
                flip(images, Draws(0, 0, *keys))
            else:
                reader.read(chosen)
        return len(ids)

    return work


def _torchvision_transforms(is_random: bool) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    random = [v2.RandomResizedCrop(_SIZE), v2.RandomHorizontalFlip(_FLIP)]
    return v2.Compose([*(random if is_random else [v2.Resize(_SHORTER), v2.CenterCrop(_SIZE)]), v2.PILToTensor()])


def _image_folder(shards: "ShardFolder", is_random: bool) -> Callable[[], int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(shards.path.parent / "photographs" / "train"), _torchvision_transforms(is_random))
    loader = DataLoader(folder, batch_size=_BATCH, shuffle=is_random)
    return lambda: sum(len(labels) for _, labels in loader)


def _webdataset(shards: "ShardFolder", is_random: bool) -> Callable[[], int]:
    import webdataset
    from torch.utils.data import DataLoader

    urls = [str(shards.shard_path(number)) for number in range(len(shards.manifest.shards))]
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_torchvision_transforms(is_random), lambda label: label)
    )
    loader = DataLoader(pipeline, batch_size=_BATCH)
    return lambda: sum(len(labels) for _, labels in loader)


def _difference(files: list[bytes], drawn: Drawn, decoder: Decoder) -> str:
    """Compare decoded crops with those of Pillow, which are antialiased: mean and largest difference."""
    import numpy as np
    from PIL import Image

    differences = []
    for data, draws in zip(files[:_COMPARED], drawn, strict=False):
        image: Image.Image = Image.open(io.BytesIO(data))
        crop = _framing(2).crop(image.height, image.width, draws)
        region, (height, width), window = crop.region, crop.scaled, crop.window
        image = image.crop((region.left, region.top, region.left + region.width, region.top + region.height))
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        expected = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
        differences.append(np.abs(decoder(data, draws).astype(int) - expected))
    return f"pixels differ from Pillow's by {np.mean(differences):.2f} of 255 on average, {np.max(differences)} at most"
