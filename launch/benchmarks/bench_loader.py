"""Benchmark of the loaders: images per second on one core, against plain alternatives that produce the same kind of batch.

The stream reader is compared with its decoder, the resident reader with a copy of the float32 batches that it makes, cold
reads with reading the same files sequentially, and a run's first start (decode and keep) with a later one.
"""

import argparse
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardstep.configs.cores import pool_threads
from shardstep.configs.errors import InputError
from shardstep.launch.benchmarks.bench_tables import (
    Table,
    add_clock_option,
    importable,
    in_turn,
    per_second,
    seconds,
    whole_number,
)
from shardstep.launch.benchmarks.photographs import measure_photographs

if TYPE_CHECKING:
    from shardstep.datasets.manifest import ShardFolder
    from shardstep.datasets.reader import Reader

_BATCH = 512
_PAD = 2  # pixels of translation
_JPEG_HEIGHT, _JPEG_WIDTH = 375, 500
_READ_BYTES = 1 << 20
_MORE_FROM_MEMORY = 10  # times as many images as others read, which would be too few to time


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_clock_option(parser)
    add = parser.add_argument
    images = (
        "shards of small images (default: 5,000 synthetic ones, 32x32); photos: only crops of synthetic photographs"
    )
    add("--images", type=Path, metavar="DIR|photos", help=images)
    add("--samples", type=whole_number, default=5000, help="limit of small images in a repeat (default: %(default)s)")
    add("--jpegs", type=whole_number, default=300, help="synthetic 500x375 JPEGs in a repeat (default: %(default)s)")


def measure(args: argparse.Namespace, folder: Path) -> Iterator[Table]:
    """Measure a table each for small images, large images, cold reads and starts; or those of photographs.

    Raises:
        InputError: the small images differ in size.
    """
    import torch

    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.write import write_shards
    from shardstep.trainer.distributed.world import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    if args.images == Path("photos"):
        yield from measure_photographs(args, folder)
        return
    if args.images is None:
        args.images = folder / "small"
        write_shards(f"synthetic:{args.samples}", "train", args.images)
    small = open_shards(args.images)
    if small.manifest.image_shape is None:
        raise InputError(f"the images in {args.images} differ in size: the small images must all have one size")
    large = _large_jpegs(args.jpegs, folder)
    yield _small_images(small, min(args.samples, small.manifest.samples), folder, args)
    yield _large_images(large, args)
    yield _cold_reads(small, "small images", args.repeats)
    yield _cold_reads(large, f"JPEGs of {_JPEG_WIDTH}x{_JPEG_HEIGHT}", args.repeats)
    yield _starts(small, folder, args)


# --- small images -----------------------------------------------------------------------------------------------------


def _small_images(shards: "ShardFolder", count: int, folder: Path, args: argparse.Namespace) -> Table:
    import numpy as np
    import torch

    from shardstep.datasets.decode import decode
    from shardstep.datasets.reader import StreamReader
    from shardstep.datasets.resident import ResidentReader

    stream = StreamReader(shards)
    ids = np.random.default_rng(0).permutation(shards.manifest.samples)[:count].tolist()
    files = [stream.read_bytes(sample) for sample in ids]
    everything = stream.read(np.arange(shards.manifest.samples))[0]
    resident = ResidentReader(everything, torch.from_numpy(shards.targets(np.arange(shards.manifest.samples))))
    batch = torch.ones(min(_BATCH, count), everything[0].numel())

    def copy() -> int:
        return sum(len(batch.clone()) for _ in range(_MORE_FROM_MEMORY * count // len(batch)))

    works: dict[str, Callable[[], int]] = {
        "a copy of such batches in float32: the memory's limit": copy,
        "resident: gather, flip, translate, normalise": _batches(resident, shards, _MORE_FROM_MEMORY * count),
        "stream: index, pread, crc32; no decode": lambda: sum(1 for sample in ids if stream.read_bytes(sample)),
        "the decoder alone: OpenCV": lambda: sum(1 for file in files if decode(file, shards.manifest.image_mode).size),
        "stream: decode, flip, translate, normalise": _batches(stream, shards, count),
        "torchvision ImageFolder + DataLoader": _image_folder(shards, files, folder, count),
        "array in memory, torchvision transforms, DataLoader": _images_in_memory(shards, everything, count),
        "webdataset, torchvision transforms, DataLoader": _plain_webdataset(shards, count),
    }
    notes = ["resident, stream with decoding and all rows below them produce augmented, normalised batches of 512"]
    for library, make in (("streaming", _mosaic_streaming), ("litdata", _litdata)):
        if importable(library):
            works[f"{library}, torchvision transforms, DataLoader"] = make(shards, files, folder)
        else:
            notes.append(f"{library} is not installed")
    height, width, _ = stream.image_shape
    values = in_turn({name: per_second(work, args.clock) for name, work in works.items()}, args.repeats)
    kind = "/".join(shards.manifest.encodings)
    title = f"{kind} images of {width}x{height}, one core, {count:,} a repeat, {args.clock} time"
    return Table(title, "images/s", values, "torchvision ImageFolder + DataLoader", notes)


def _batches(reader: "Reader", shards: "ShardFolder", count: int) -> Callable[[], int]:
    """Return a work: read and augment at least `count` training images as training does."""
    import torch

    from shardstep.datasets.augment import Normalize, build_transforms
    from shardstep.datasets.batches import OrderConfig, TrainBatches

    device, channels = torch.device("cpu"), shards.manifest.channels
    batches = TrainBatches(
        reader,
        OrderConfig(shards.samples_per_shard, 0, 1, None),
        global_batch_size=_BATCH,
        samples_per_epoch=shards.manifest.samples,
        rank=0,
        world_size=1,
        max_micro_batch=_BATCH,
        transforms=build_transforms([{"name": "flip", "probability": 0.5}, {"name": "translate", "pixels": _PAD}]),
        normalize=Normalize([0.5] * channels, [0.25] * channels, reader.image_shape, device),
        memory_format=torch.channels_last,
        device=device,
        workers=0,
    ).from_position(0, 0)

    def work() -> int:
        seen = 0
        while seen < count:
            seen += sum(len(micro.labels) for micro in next(batches).micro_batches)
        return seen

    return work


def _torchvision_transforms(shards: "ShardFolder") -> Callable[[Any], Any]:
    from torchvision import transforms

    channels, side = shards.manifest.channels, shards.manifest.image_shape
    assert side is not None
    return transforms.Compose([
        transforms.RandomHorizontalFlip(),
        transforms.RandomCrop(side[1:], padding=_PAD, padding_mode="reflect"),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * channels, [0.25] * channels),
    ])  # fmt: skip


def _loaded(dataset: Any, count: int | None = None, shuffle: bool = False) -> Callable[[], int]:
    """Return a work: read an epoch of a torch DataLoader, or its first `count` images."""
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, num_samples=count) if shuffle else None
    loader = DataLoader(dataset, batch_size=_BATCH, sampler=sampler)
    return lambda: sum(len(batch[1]) for batch in loader)


def _image_folder(shards: "ShardFolder", files: list[bytes], folder: Path, count: int) -> Callable[[], int]:
    from torchvision.datasets import ImageFolder

    root, suffix = folder / "files", shards.manifest.encodings[0]
    (root / "any").mkdir(parents=True)
    for number, content in enumerate(files):
        (root / "any" / f"{number}.{suffix}").write_bytes(content)
    return _loaded(ImageFolder(str(root), _torchvision_transforms(shards)), count, shuffle=True)


def _images_in_memory(shards: "ShardFolder", pixels: Any, count: int) -> Callable[[], int]:
    """Return a work that does what torchvision.datasets.CIFAR10 does: a row of an array through PIL and the transforms."""
    import numpy as np
    from PIL import Image
    from torch.utils.data import Dataset

    labels = shards.targets(np.arange(shards.manifest.samples))
    transform, array = _torchvision_transforms(shards), pixels.squeeze(3).numpy()

    class InMemory(Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, number: int) -> tuple[Any, int]:
            return transform(Image.fromarray(array[number])), int(labels[number])

    return _loaded(InMemory(), count, shuffle=True)


def _plain_webdataset(shards: "ShardFolder", count: int) -> Callable[[], int]:
    import webdataset

    urls = [str(shards.shard_path(number)) for number in range(len(shards.manifest.shards))]
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .slice(count)
        .shuffle(1000)
        .decode("pil" if shards.manifest.channels == 3 else "pill")
        .to_tuple(";".join(shards.manifest.encodings), "cls")
        .map_tuple(_torchvision_transforms(shards), lambda label: label)
    )
    return _loaded(pipeline)


def _mosaic_streaming(shards: "ShardFolder", files: list[bytes], folder: Path) -> Callable[[], int]:
    import streaming

    out, suffix = str(folder / "mds"), shards.manifest.encodings[0]
    with streaming.MDSWriter(out=out, columns={"image": suffix, "label": "int"}) as writer:
        for content in files:
            writer.write({"image": _pil(content), "label": 0})
    transform = _torchvision_transforms(shards)

    class Transformed(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["label"]

    return _loaded(Transformed(local=out, shuffle=True, batch_size=_BATCH))


def _litdata(shards: "ShardFolder", files: list[bytes], folder: Path) -> Callable[[], int]:
    import litdata

    out, transform = folder / "litdata", _torchvision_transforms(shards)
    writer = litdata.streaming.writer.BinaryWriter(str(out), chunk_bytes="16MB")
    for number, content in enumerate(files):
        writer[number] = {"image": content, "label": 0}
    writer.done()
    writer.merge()

    class Transformed(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(_pil(sample["image"])), sample["label"]

    return _loaded(Transformed(str(out), shuffle=True))


def _pil(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content))


# --- large images -----------------------------------------------------------------------------------------------------


def _large_jpegs(count: int, folder: Path) -> "ShardFolder":
    """Write shards of JPEGs of ImageNet's size: smooth colours with some noise, about 100 KB each."""
    import cv2
    import numpy as np

    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.write import write_shards

    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (_JPEG_WIDTH, _JPEG_HEIGHT), interpolation=cv2.INTER_CUBIC)
        noisy = smooth + generator.normal(0, 12, size=smooth.shape)
        path = folder / "jpegs" / "train" / "any" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), noisy.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    write_shards(str(folder / "jpegs"), "train", folder / "large", samples_per_shard=100)
    return open_shards(folder / "large")


def _large_images(shards: "ShardFolder", args: argparse.Namespace) -> Table:
    import numpy as np
    from torchvision import transforms

    from shardstep.datasets.decode import decode
    from shardstep.datasets.decode_crop import missing_for_partial
    from shardstep.datasets.framing import Framing
    from shardstep.datasets.reader import StreamReader

    framing = Framing.covering(224, 224, 2 if missing_for_partial() else 3)
    full_size, resized = StreamReader(shards), StreamReader(shards, framing)
    ids = np.random.default_rng(0).permutation(shards.manifest.samples)
    files = [full_size.read_bytes(sample) for sample in ids.tolist()]
    batches = np.array_split(ids, max(1, len(ids) // 32))
    transform = transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224)])
    works: dict[str, Callable[[], int]] = {
        "the decoder alone: OpenCV": lambda: sum(1 for file in files if decode(file, "RGB").size),
        "stream: index, pread, crc32, decode": lambda: sum(len(full_size.read(batch)[1]) for batch in batches),
        "stream: the same, resized to 224": lambda: sum(len(resized.read(batch)[1]) for batch in batches),
        "PIL from memory, resized to 224 by torchvision": lambda: sum(1 for file in files if transform(_pil(file))),
    }
    values = in_turn({name: per_second(work, args.clock) for name, work in works.items()}, args.repeats)
    size = f"{_JPEG_WIDTH}x{_JPEG_HEIGHT}, {sum(map(len, files)) / len(files) / 1000:.0f} KB"
    title = f"jpg images of {size}, one core, {len(ids):,} a repeat, {args.clock} time"
    return Table(title, "images/s", values, "the decoder alone: OpenCV")


# --- cold reads -------------------------------------------------------------------------------------------------------


def _cold_reads(shards: "ShardFolder", what: str, repeats: int) -> Table:
    """Measure MB/s of shards that are not in the page cache: read sequentially, and image by image in a shuffled order."""
    paths = [shards.shard_path(number) for number in range(len(shards.manifest.shards))]
    megabytes = shards.manifest.bytes / 1e6

    def cold(read: Callable[[], object]) -> Callable[[], float]:
        measured = seconds(read)

        def work() -> float:
            for path in paths:
                _forget(path)
            return megabytes / measured()

        return work

    works = {
        "the files one after the other": cold(lambda: _read_through(paths)),
        "stream, all shards shuffled together": cold(lambda: _read_shuffled(shards, window_shards=None)),
        "stream, shuffled in windows of 4 shards": cold(lambda: _read_shuffled(shards, window_shards=4)),
    }
    note = "the stream reads images one by one and checks their crc32; MB of complete shards"
    title = f"cold reads, {what}, {megabytes:,.0f} MB, one thread"
    return Table(title, "MB/s", in_turn(works, repeats), "the files one after the other", [note])


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # dirty pages would stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_through(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def _read_shuffled(shards: "ShardFolder", window_shards: int | None) -> None:
    """Read an epoch in batches, and announce shards one block ahead, as training does."""
    from shardstep.datasets.order import EpochOrder
    from shardstep.datasets.reader import StreamReader

    reader = StreamReader(shards)
    order = EpochOrder(shards.samples_per_shard, 0, 0, 1, window_shards)
    announced = set()
    for start in range(0, order.num_samples, _BATCH):
        stop = min(start + _BATCH, order.num_samples)
        for lane, block in order.blocks(start, stop):
            for upcoming in (block, block + 1):
                if (lane, upcoming) not in announced:
                    announced.add((lane, upcoming))
                    reader.will_need(order.shards_of(lane, upcoming))
        for sample in sorted(order.slice(start, stop).tolist()):
            reader.read_bytes(sample)


# --- starts -----------------------------------------------------------------------------------------------------------


def _starts(shards: "ShardFolder", folder: Path, args: argparse.Namespace) -> Table:
    """Measure seconds until a resident set can be read: decoded and cached, or checked and mapped."""
    from unittest import mock

    import torch

    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.resident import load_resident

    cache = folder / "cache"
    start = seconds(lambda: load_resident(open_shards(shards.path), None, torch.device("cpu")), args.clock)

    def first_start() -> float:
        for path in cache.glob("*"):
            path.unlink()
        return start()

    works = {"first start: decode and keep": first_start, "later start: check and map": start}
    with mock.patch.dict(os.environ, {"SHARDSTEP_CACHE": str(cache)}):
        values = in_turn(works, args.repeats)
    what = f"start of a resident set of {shards.manifest.samples:,} images"
    title = f"{what}, decoded by {pool_threads()} threads, {args.clock} time"
    return Table(title, "s", values, "first start: decode and keep")
