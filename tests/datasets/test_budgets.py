"""What a batch may cost, counted and not timed: operations, bytes, system calls and Python calls, and memory over epochs."""

import gc
import hashlib
import os
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardstep.datasets import decode, manifest, reader
from shardstep.datasets.augment import Normalize, build_transforms
from shardstep.datasets.batches import GlobalBatch, OrderConfig, TrainBatches
from shardstep.datasets.manifest import INDEX_DTYPE, Manifest, Shard, open_shards, write_manifest
from shardstep.datasets.reader import Reader, StreamReader
from shardstep.datasets.resident import ResidentReader
from shardstep.datasets.write import write_shards

CPU = torch.device("cpu")
IMAGE_BYTES = 32 * 32 * 3


class Counting(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that are not views of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.new_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and _storage(leaf) not in given]
        self.operations += 1
        self.new_bytes += sum(leaf.untyped_storage().nbytes() for leaf in made)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def batches(
    source: Reader, num_samples: list[int], batch_size: int, window: int | None = None
) -> Iterator[GlobalBatch]:
    return TrainBatches(
        source,
        OrderConfig(num_samples, 0, 1, window),
        global_batch_size=batch_size,
        samples_per_epoch=sum(num_samples),
        rank=0,
        world_size=1,
        max_micro_batch=2048,
        transforms=build_transforms([{"name": "flip", "probability": 0.5}, {"name": "translate", "pixels": 2}]),
        normalize=Normalize([0.5] * 3, [0.25] * 3, (32, 32, 3), CPU),
        memory_format=torch.channels_last,
        device=CPU,
        workers=0,
    ).from_position(0, 0)


@pytest.fixture
def resident() -> ResidentReader:
    pixels = torch.zeros(1024, 32, 32, 3, dtype=torch.uint8)
    return ResidentReader(pixels, torch.zeros(1024, dtype=torch.int64))


def read_one(made: Iterator[GlobalBatch]) -> Counting:
    next(made)
    with Counting() as counted:
        list(next(made).micro_batches)
    return counted


def test_a_resident_image_is_written_as_seldom_as_it_can_be(resident: ResidentReader) -> None:
    # uint8: gathered 1, half of them mirrored 2 x 1/2, padded to 36x36 (36/32)^2, shifted 36/32, cut out 1; then float32 4
    written = 1 + 1 + (36 / 32) ** 2 + 36 / 32 + 1 + 4
    numbers = 900  # of augmentation: 64-bit words of three draws, and what is computed on the way to them
    counted = read_one(batches(resident, [1024], 512))
    assert counted.new_bytes / 512 < 1.02 * written * IMAGE_BYTES + numbers


def test_the_operations_of_a_resident_batch_hardly_depend_on_its_size(resident: ResidentReader) -> None:
    small, large = (read_one(batches(resident, [1024], size)).operations for size in (32, 512))
    # Normalisation goes in parts of 85 images: 7 parts instead of 1, of two operations each
    assert large - small <= 6 * 2
    assert large < 130


def test_mirrored_images_are_not_written_back_value_by_value(resident: ResidentReader) -> None:
    class NoIndexCopy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "index_copy" not in str(function)  # on uint8: 35 times as long as NumPy's runs of bytes
            assert "index_put" not in str(function)
            return function(*args, **(kwargs or {}))

    with NoIndexCopy():
        list(next(batches(resident, [1024], 512)).micro_batches)


def test_a_streamed_image_is_read_checked_and_decoded_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    opened = open_shards(shards / "train")
    counted(os, "open")
    counted(os, "pread")
    counted(zlib, "crc32")
    counted(reader, "decode")
    stream = StreamReader(opened)
    for ids in np.array_split(np.random.default_rng(0).permutation(101), 5):
        stream.read(ids)
    assert calls == {"open": 6, "pread": 101, "crc32": 101, "decode": 101}  # 101 images in 6 shards


def test_the_python_calls_of_a_streamed_image(shards: Path) -> None:
    stream, ids = StreamReader(open_shards(shards / "train")), np.arange(101)
    stream.read(ids)  # imports the decoder, opens the shards
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        calls[event] += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        stream.read(ids)
    finally:
        sys.setprofile(None)
    assert calls["call"] <= 4 * 101 + 10  # _decode, read_bytes, the file's read, decode
    assert calls["c_call"] <= 10 * 101 + 30


def test_the_kernel_is_advised_of_every_byte_in_pieces_that_it_honours(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: advised.append((start, length)))
    monkeypatch.setattr(reader, "_ADVISE_BYTES", 10_000)  # this shard is small
    opened = open_shards(shards / "train")
    StreamReader(opened).will_need([0])
    size = opened.manifest.shards[0].bytes
    assert advised == [(start, 10_000) for start in range(0, size, 10_000)]
    assert len(advised) > 1


def test_one_piece_of_advice_is_no_longer_than_the_default_read_ahead() -> None:
    # Linux 6 cuts advice to max(the device's io_pages, its read_ahead_kb), of which the default is 128 KiB: what is past
    # that of a larger piece would be read by nobody.
    assert reader._ADVISE_BYTES <= 128 << 10


def test_shards_that_would_not_stay_in_the_page_cache_are_not_read_ahead(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, advised = open_shards(shards / "train"), list[int]()
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advised.append(1))
    two = sum(shard.bytes for shard in opened.manifest.shards[:2])
    monkeypatch.setattr(reader, "_MOST_READ_AHEAD", two)
    StreamReader(opened).will_need([0, 1, 2])
    assert not advised
    StreamReader(opened).will_need([0, 1])
    assert advised


def huge_set(folder: Path, num_shards: int, per_shard: int) -> Path:
    """A data set of which only manifest and index are real: its tars are holes."""
    samples = num_shards * per_shard
    index = np.zeros(samples, dtype=INDEX_DTYPE)
    index["shard"] = np.repeat(np.arange(num_shards, dtype=np.uint32), per_shard)
    index["label"] = np.arange(samples, dtype=np.uint32) % 10
    made = [Shard(f"{number:06d}.tar", per_shard * 1024, "", per_shard) for number in range(num_shards)]
    for shard in made:
        (folder / shard.name).touch()
        os.truncate(folder / shard.name, shard.bytes)
    digest = hashlib.sha256(index.tobytes()).hexdigest()
    classes, counts = [str(label) for label in range(10)], [samples // 10] * 10
    content = Manifest(
        classes, samples, counts, "RGB", [3, 32, 32], ["png"], [0.5] * 3, [0.25] * 3, {}, made, index_sha256=digest
    )
    write_manifest(folder, content, index.tobytes())
    return folder


class NoPixels(StreamReader):
    """Reads labels through the index, and no images."""

    def _decode(self, sample_id: int, draws: list[float] | None, out: np.ndarray) -> np.ndarray:
        return np.zeros((32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("window", [None, 7])
def test_the_first_batch_of_a_huge_set_takes_little_memory(
    tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_MOST_COPIED", 32 << 20)  # 2 million samples are 40 MB of index
    huge_set(tmp_path, 100, 20_000)
    gc.collect()
    tracemalloc.start()
    try:
        opened = open_shards(tmp_path)
        stream = NoPixels(opened)
        (micro,) = next(batches(stream, opened.samples_per_shard, 512, window)).micro_batches
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert micro.labels.tolist() == (micro.sample_ids % 10).tolist()
    # A chunk of 65,536 positions takes up to 20 temporary arrays of 8 bytes each; an int64 per sample would be 16 MB.
    assert peak < 20 * 8 * 65_536 + 3_000_000


def traced_after_epochs(source: StreamReader, num_samples: list[int], epochs: list[int], window: int) -> list[int]:
    """Traced bytes (Python's and NumPy's, pixels included) when some epochs have been read."""
    made, found, total = batches(source, num_samples, 30, window), [], sum(num_samples)
    for epoch in range(max(epochs) + 1):
        seen = 0
        while seen < total:
            seen += sum(len(micro.labels) for micro in next(made).micro_batches)
        gc.collect()
        if epoch in epochs:
            found.append(tracemalloc.get_traced_memory()[0])
    return found


def resident_set_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_20_epochs(shards: Path) -> None:
    opened = open_shards(shards / "train")
    decode.decode(StreamReader(opened).read_bytes(0), "RGB")  # imports the decoder
    tracemalloc.start()
    try:
        early, middle = traced_after_epochs(StreamReader(opened), opened.samples_per_shard, [1, 3], window=2)
        before = resident_set_bytes()
        late, last = traced_after_epochs(StreamReader(opened), opened.samples_per_shard, [1, 20], window=2)
        grown = resident_set_bytes() - before
    finally:
        tracemalloc.stop()
    # 101 images are 310,272 bytes: 19 epochs that kept 1 % of what they read would grow by 59,000
    assert last - late < 30_000, (early, middle, late, last)
    assert grown < 4 << 20


def test_memory_of_a_stream_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 1400):
        write_shards(f"synthetic:{count}", "train", tmp_path / str(count), samples_per_shard=50)
        decode.decode(StreamReader(open_shards(tmp_path / str(count))).read_bytes(0), "RGB")
        gc.collect()
        tracemalloc.start()
        try:
            opened = open_shards(tmp_path / str(count))
            traced_after_epochs(StreamReader(opened), opened.samples_per_shard, [0], window=2)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # 1,200 images more are 3.7 MB of pixels; of each stay 20 bytes of index and 8 of label, and of each shard of 50 its
    # entry in the manifest (about 2 KB while it is parsed) and an open file
    assert peaks[1] - peaks[0] < 1200 * (20 + 8 + 8 + 50) + 60_000, peaks
