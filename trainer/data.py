"""The recipe's data section to readers: opened, checked against each other, resident or streamed."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shardstep.configs.errors import InputError
from shardstep.configs.schema import DataConfig, Recipe
from shardstep.datasets.augment import Normalize, smallest_side
from shardstep.datasets.manifest import MANIFEST_NAME, Manifest, ShardFolder, open_shards
from shardstep.datasets.reader import Reader, StreamReader
from shardstep.datasets.resident import decoded_bytes, load_resident
from shardstep.datasets.write import make_missing_shards

WINDOW_ALL_BYTES = 4 * 10**9  # data sets up to this size are shuffled as a whole
RESIDENT_SHARE = 0.25  # of the memory of the host, or of the GPU, that decoded images may take


@dataclass(frozen=True)
class Data:
    """Training and test set, ready to be read."""

    train: ShardFolder
    test: ShardFolder
    train_reader: Reader
    test_reader: Reader
    normalize: Normalize

    @property
    def num_classes(self) -> int:
        return len(self.train.manifest.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width), as models see it."""
        height, width, channels = self.train_reader.image_shape
        return channels, height, width


def make_missing_data(config: DataConfig) -> None:
    """Write the shards that are not there from data.source, once per node.

    Raises:
        InputError: the source cannot be read.
    """
    if config.source is None:
        return
    for split, folder in (("train", config.train), ("test", config.test)):
        if not (Path(folder) / MANIFEST_NAME).is_file():
            make_missing_shards(config.source, split, Path(folder))


def open_both(config: DataConfig) -> tuple[ShardFolder, ShardFolder]:
    """Open training and test set and check that they belong together.

    Raises:
        InputError: one cannot be opened, or their classes or kinds of image differ.
    """
    train, test = open_shards(config.train), open_shards(config.test)
    ours, theirs = train.manifest, test.manifest
    if ours.classes != theirs.classes:
        raise InputError(
            f"{config.train} and {config.test} have different classes: {_short(ours)} and {_short(theirs)}"
        )
    if ours.image_mode != theirs.image_mode:
        raise InputError(f"{config.train} has {ours.image_mode} images and {config.test} has {theirs.image_mode} ones")
    if config.resize is None and ours.image_shape != theirs.image_shape:
        raise InputError(
            f"{config.train} and {config.test} have images of different sizes: {ours.image_shape} and "
            f"{theirs.image_shape}; give data.resize to make them equal"
        )
    return train, test


def choose_mode(config: DataConfig, train: ShardFolder, test: ShardFolder, device: torch.device) -> str:
    """resident or stream: as the recipe says, else resident if both sets fit."""
    if config.mode != "auto":
        return config.mode
    sizes = [decoded_bytes(shards, config.resize) for shards in (train, test)]
    if None in sizes:
        return "stream"
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return "resident" if sum(size or 0 for size in sizes) <= RESIDENT_SHARE * memory else "stream"


def window_shards(config: DataConfig, manifest: Manifest) -> int | None:
    """data.window_shards as a number; None is all. The default depends on the manifest alone."""
    if isinstance(config.window_shards, int):
        return config.window_shards
    if config.window_shards == "all" or manifest.bytes <= WINDOW_ALL_BYTES:
        return None
    return max(1, WINDOW_ALL_BYTES * len(manifest.shards) // manifest.bytes)


def load(recipe: Recipe, train: ShardFolder, test: ShardFolder, device: torch.device) -> Data:
    """Make the readers and the normalisation.

    Raises:
        InputError: the images are damaged, differ in size, or are too small for a transform.
    """
    config = recipe.data
    if config.mode == "resident":
        train_reader: Reader = load_resident(train, config.resize, device)
        test_reader: Reader = load_resident(test, config.resize, device)
    else:
        train_reader, test_reader = StreamReader(train, config.resize), StreamReader(test, config.resize)
    height, width, channels = train_reader.image_shape
    for entry in config.augment:
        if min(height, width) < smallest_side(entry):
            raise InputError(
                f"data.augment: {entry['name']} with these options needs images of at least "
                f"{smallest_side(entry)} pixels a side, these have {width}x{height}"
            )
    return Data(train, test, train_reader, test_reader, make_normalize(config, train.manifest, train_reader, device))


def load_for_evaluation(recipe: Recipe, device: torch.device) -> Data:
    """A run's data with its test set as the recipe names it now, streamed: each image is needed once.

    Raises:
        InputError: a set cannot be opened, or the test set has other classes than the training set.
    """
    train, test = open_both(recipe.data)
    train_reader, test_reader = StreamReader(train, recipe.data.resize), StreamReader(test, recipe.data.resize)
    normalize = make_normalize(recipe.data, train.manifest, train_reader, device)
    return Data(train, test, train_reader, test_reader, normalize)


def make_normalize(config: DataConfig, manifest: Manifest, reader: Reader, device: torch.device) -> Normalize:
    """The normalisation of data.normalize, with the training set's statistics where it says `manifest`.

    Raises:
        InputError: the numbers of channels differ.
    """
    channels = manifest.channels
    if config.normalize == "manifest":
        mean, std = manifest.mean, [value or 1.0 for value in manifest.std]  # a channel without contrast stays 0
    elif config.normalize == "none":
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean, std = list(config.normalize["mean"]), list(config.normalize["std"])
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise InputError(f"data.normalize has {len(mean)} channels, the images have {channels}")
    return Normalize(mean, std, reader.image_shape, device)


def _short(manifest: Manifest) -> str:
    names = ", ".join(manifest.classes[:3])
    return f"{len(manifest.classes)} ({names}{', ...' if len(manifest.classes) > 3 else ''})"
