"""Open the training and test sets of a recipe, check that they match, and read them resident or streamed."""

import hashlib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.configs.held_out import NO_TEST_SET, held_out_share
from shardstep.configs.load import DEFAULT_TRAIN, LoadedRecipe
from shardstep.configs.resolve import ResolvedRecipe
from shardstep.configs.schema import CropVersion, DataConfig, DataMode, OrderVersion
from shardstep.configs.selection import mix_name, mix_of
from shardstep.configs.text import listed
from shardstep.datasets.augment import Normalize, build_mixing, build_transforms, smallest_side
from shardstep.datasets.batches import TrainBatches, test_batches
from shardstep.datasets.decode_crop import PARTIAL, missing_for_partial
from shardstep.datasets.framing import RANDOM_CROP, Framing, framing_of, random_crop
from shardstep.datasets.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardFolder,
    check_same_kind,
    did_you_mean,
    open_shards,
)
from shardstep.datasets.order import ORDER_VERSION
from shardstep.datasets.overlap import count_shared
from shardstep.datasets.parts import Part, PartName, hold_out
from shardstep.datasets.reader import Reader, StreamReader
from shardstep.datasets.resident import decoded_bytes, load_resident
from shardstep.datasets.sampling import Strata
from shardstep.datasets.sources import surely_differs
from shardstep.datasets.sources.tables import LabelOptions
from shardstep.datasets.stored_images import ImageOptions
from shardstep.datasets.training_order import open_strata, open_training_set, training_orders
from shardstep.datasets.write import make_missing_shards
from shardstep.trainer import machine
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.evaluation import TestBatches
from shardstep.trainer.formats.candidates import MEMORY_FORMATS
from shardstep.trainer.optim.plan import Plan

_MOST_SHARED = 0.01  # of the images of a set: a few may well be in another one by chance
RESIDENT_SHARE = 0.25  # of the memory of the host, or of the GPU, that decoded images may take


@dataclass(frozen=True)
class Parts:
    """What a run trains on, what it is evaluated on meanwhile, and what it is evaluated on at the end.

    Without a validation set, both are the test set; without a test set, both are the validation set.
    """

    train: Part
    held_out: Part
    final: Part
    held_out_name: PartName
    final_name: PartName
    # Of the training samples, where they do not all come equally often.
    strata: Strata | None = field(default=None, kw_only=True)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the training set, and of a file of weights for its samples, if there is one."""
        own = self.train.manifest.fingerprint
        digest = self.strata.digest if self.strata else ""
        return hashlib.sha256(f"{own} {digest}".encode()).hexdigest() if digest else own

    @property
    def evaluated(self) -> dict[PartName, Part]:
        """What is evaluated, by name: "validation", "test" or both."""
        return {self.held_out_name: self.held_out, self.final_name: self.final}

    @property
    def distinct(self) -> list[Part]:
        """The parts, each once."""
        return [self.train, *self.evaluated.values()]


@dataclass(frozen=True)
class Data(Parts):
    """The parts with their readers."""

    train_reader: Reader
    held_out_reader: Reader
    final_reader: Reader
    normalize: Normalize

    @property
    def num_classes(self) -> int:
        return len(self.train.manifest.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width), as models see it."""
        height, width, channels = self.train_reader.image_shape
        return channels, height, width

    def first_samples(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return up to `count` first training samples: normalized images (count, C, H, W) and their labels."""
        images, labels = self.first_pixels(count, device)
        return self.normalize(images), labels

    def first_pixels(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return up to `count` first training samples: uint8 images (count, H, W, C) and their labels."""
        images, labels = self.train_reader.read(self.train.first(count))
        return images.to(device), labels.to(device)

    def first_labels(self, count: int, device: torch.device) -> Tensor:
        """Return as many labels as that, those of the first training sample again and again."""
        first = np.repeat(self.train.first(1), count)
        return torch.from_numpy(self.train.shards.targets(first)).to(device)


def missing_sets(config: DataConfig) -> dict[str, str]:
    """Return the folders of a recipe that hold no shards, by their split: train or test."""
    return {
        split: folder
        for split, folder in folders_of(config).items()
        if split in ("train", "test") and not (Path(folder).expanduser() / MANIFEST_NAME).is_file()
    }


def folders_of(config: DataConfig) -> dict[str, str]:
    """Return the folders of a recipe's data sets, by their split: train, validation and test, as far as there are any.

    In place of train, a mix has mix[0], mix[1], ...
    """
    mix = {f"mix[{number}]": entry.dir for number, entry in enumerate(mix_of(config))}
    folders = mix or {"train": config.train}
    if isinstance(config.validation, str):
        folders["validation"] = config.validation
    return folders if config.test == NO_TEST_SET else folders | {"test": config.test}


def check_given_folders(loaded: LoadedRecipe) -> None:
    """Check that folders given on the command line hold shards, so that a typo in one is not taken for a new data set.

    Raises:
        InputError: one does not, and there is no data.source beside it; or nothing says what to train on.
    """
    missing = missing_sets(loaded.recipe.data)
    if loaded.recipe.data.source is None:  # nothing would be written there
        if missing.get("train") == DEFAULT_TRAIN:
            raise InputError(
                f"recipe {loaded.source} needs images: give data.source=my/pictures, a folder of <split>/<class>/<file> with "
                f"the splits train and test, or one of <class>/<file> and data.validation=0.1 data.test=none"
            )
        return
    for key, folder in loaded.given_folders.items():
        if key.removeprefix("data.") in missing:
            raise InputError(
                f"{key}={folder} holds no shards{did_you_mean(folder)}. To write them there, give the source beside it: "
                f"data.source={loaded.recipe.data.source}"
            )


def make_missing_data(config: DataConfig) -> None:
    """Write missing shards from data.source, once per node.

    Raises:
        InputError: the source cannot be read.
    """
    if config.source is None:
        return
    for split, folder in missing_sets(config).items():
        try:
            is_only_split = config.test == NO_TEST_SET
            make_missing_shards(
                config.source,
                split,
                Path(folder).expanduser(),
                _label_options(config),
                is_only_split,
                _image_options(config),
            )
        except InputError as error:  # perhaps only on this node: its first rank reports it
            error.everywhere = not launch_env.is_first_rank_of_node()
            raise


def _label_options(config: DataConfig) -> LabelOptions:
    return LabelOptions(config.labels, config.image_column, config.label_column, config.label_separator)


def _image_options(config: DataConfig) -> ImageOptions:
    return ImageOptions("follow" if config.orientation == "auto" else config.orientation)


def data_warnings(config: DataConfig, data: Data, reconstructs: bool) -> list[str]:
    """Return what may be wrong with a run's data: shards of another source, shared or equal images, empty classes."""
    shared = shared_images(data)
    found = [unused_source_warning(config, data), f"{shared}; {SHARED_IMAGES_REMEDY}" if shared else None]
    if not reconstructs:
        found.append(unlearnable_classes(data.train))
    if config.repeats > 1 and {entry["name"] for entry in config.augment} <= {"alternating_flip", "shrink"}:
        found.append(f"data.repeats={config.repeats}, but nothing in data.augment makes the copies of an image differ")
    return [text for text in found if text]


def unlearnable_classes(train: Part) -> str | None:
    """Say that there is only one class, or which classes have no training images; None where neither is so."""
    classes = train.manifest.classes
    if len(classes) == 1:
        return f"the only class is {listed(classes)}: every prediction is correct, and nothing is learnt"
    samples = train.samples_per_class()
    empty = [classes[label] for label in np.flatnonzero(samples == 0)]
    if not empty:
        return None
    which = f"{len(empty):,} of {len(classes):,} classes have no training images"
    return f"{which}, so nothing is learnt about them: {listed(empty)}"


def unused_source_warning(config: DataConfig, data: Data) -> str | None:
    """Return a warning if existing shards hold other images than data.source; else None."""
    if config.source is None:
        return None
    folders, labels = folders_of(config), _label_options(config)
    for split, part in (("train", data.train), ("test", data.final)):
        folder = folders.get(split)
        if folder and surely_differs(config.source, manifest := part.manifest, split, labels):
            return (
                f"data.source={config.source} is not used: {folder} already holds shards of other images "
                f"({manifest.made.get('source', 'of unknown origin')}; classes {_short(manifest)}). To use the source, give "
                f"another folder as data.{split}; to use these shards, data.source=null"
            )
    return None


SHARED_IMAGES_REMEDY = (
    "a model knows the images that it was trained or chosen on: give each set images of its own, or hold some out of the "
    "training set with data.validation=0.1 data.test=none"
)


def shared_images(parts: Parts) -> str | None:
    """Say which two sets have images in common, as if one folder was given for both; None if it is less than 1 %."""
    for (one_name, one), (other_name, other) in combinations([("train", parts.train), *parts.evaluated.items()], 2):
        shared, looked_for = count_shared(other, one)
        if shared > _MOST_SHARED * looked_for:
            whole = "training" if one_name == "train" else one_name
            some = "" if looked_for == other.samples else " that were looked for"
            return f"{shared:,} of {looked_for:,} {other_name} images{some} are also in the {whole} set"
    return None


def open_parts(config: DataConfig) -> Parts:
    """Open a recipe's data sets, check that they match, and hold out what the recipe says.

    Raises:
        InputError: one cannot be opened, their classes or sizes of images differ, nothing would be left of one, or the
            weights of data.sampling do not fit.
    """
    train, share = Part(open_training_set(config)), held_out_share(config)
    folders = {split: folder for split, folder in folders_of(config).items() if split in ("validation", "test")}
    opened: dict[str, Part] = {split: Part(open_shards(folder)) for split, folder in folders.items()}
    for split, part in opened.items():
        check_same_task(train.manifest, part.manifest, mix_name(config), folders[split], framing_of(config))
    for name, part in (("train", train), *opened.items()):
        if config.orientation not in ("auto", part.manifest.orientation):
            raise InputError(
                f"data.orientation={config.orientation}, but {folders.get(name) or mix_name(config)} was written with "
                f"{part.manifest.orientation}: leave data.orientation out to read it so, or write it again"
            )
    if share is not None:
        train, opened["validation"] = hold_out(train.shards, share, config.split_seed)
    held_out: PartName = "validation" if "validation" in opened else "test"
    final: PartName = "test" if "test" in opened else "validation"
    strata = open_strata(config, train)
    return Parts(train, opened[held_out], opened[final], held_out, final, strata=strata)


def check_same_task(one: Manifest, other: Manifest, one_name: str, other_name: str, framing: Framing | None) -> None:
    """Check that two sets have the same classes and sizes of images. Grey and coloured images are read in the mode of `one`.

    Raises:
        InputError: they do not.
    """
    if one.classes != other.classes:
        lacks = set(other.classes) <= set(one.classes)
        remedy = "; `shards write --classes-of` gives a set the classes of another" if lacks else ""
        raise InputError(
            f"{one_name} and {other_name} have different classes: {_short(one)} and {_short(other)}; "
            f"{_class_difference(one, other, one_name, other_name)}{remedy}"
        )
    check_same_kind([(one_name, one), (other_name, other)])
    check_same_size(one, other, one_name, other_name, framing)


def check_same_size(one: Manifest, other: Manifest, one_name: str, other_name: str, framing: Framing | None) -> None:
    """Check that the images of two sets have one size as they are read.

    Raises:
        InputError: they have not.
    """
    sizes = [manifest.shape_when_read(framing, one.image_mode) for manifest in (one, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{one_name} and {other_name} have images of different sizes: {one.image_shape} and {other.image_shape}; "
            f"give data.resize to make them equal"
        )


def other_mode_note(train: Manifest, name: str, other: Manifest) -> str | None:
    """Say that images to evaluate on are converted to the training set's mode; None where they have the same."""
    if train.image_mode == other.image_mode:
        return None
    modes = {"RGB": "in colour", "L": "grey"}
    own, read = modes[other.image_mode], modes[train.image_mode]
    return f"the {name} images are {own}; they are read {read}, like the training images"


def held_out_text(config: DataConfig, parts: Parts) -> str:
    """Say what is held out for validation, and when the test set is evaluated."""
    origin = config.validation if isinstance(config.validation, str) else "the training set"
    at_the_end = "the test set is evaluated at the end" if "test" in parts.evaluated else "there is no test set"
    return f"{parts.held_out.samples:,} images of {origin} for validation; {at_the_end}"


def choose_mode(config: DataConfig, parts: Parts, device: torch.device) -> DataMode:
    """Return the recipe's data mode; for auto, resident if all sets fit in memory and are decoded alike, else stream."""
    if config.mode != "auto":
        return config.mode
    mode = parts.train.manifest.image_mode
    sizes = [decoded_bytes(shards.manifest, framing_of(config), mode) for shards in opened_sets(parts)]
    if None in sizes or random_crop(config.augment):
        return "stream"
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine.memory_bytes()
    return "resident" if sum(size or 0 for size in sizes) <= RESIDENT_SHARE * memory else "stream"


def choose_order_version(config: DataConfig) -> OrderVersion:
    """Return the recipe's order version; for auto, that of new runs."""
    return ORDER_VERSION if config.order_version == "auto" else config.order_version


def opened_sets(parts: Parts) -> list[ShardFolder]:
    """Return the data sets that these are parts of, each once."""
    return list({id(part.shards): part.shards for part in parts.distinct}.values())


def choose_crop_version(config: DataConfig, parts: Parts) -> CropVersion:
    """Return the recipe's crop version; for auto, the fastest for these sets that works on this machine."""
    if config.crop_version != "auto":
        return config.crop_version
    return PARTIAL if _cuts_jpegs(config, parts) and not missing_for_partial() else 2


def whole_jpegs_note(config: DataConfig, parts: Parts) -> str | None:
    """Say that this machine decodes more of JPEGs than it needs, and what it lacks; None where it does not."""
    lacks = missing_for_partial() if config.crop_version == 2 and _cuts_jpegs(config, parts) else None
    return f"JPEGs are decoded entirely; to decode only what is needed takes {lacks}" if lacks else None


def _cuts_jpegs(config: DataConfig, parts: Parts) -> bool:
    encodings = {encoding for part in parts.distinct for encoding in part.manifest.encodings}
    return framing_of(config) is not None and not encodings.isdisjoint(("jpg", "jpeg"))


def load(config: DataConfig, mode: DataMode, parts: Parts, device: torch.device) -> Data:
    """Build the readers and the normalisation. Parts of one data set share a reader.

    Raises:
        InputError: the images are damaged, differ in size, or are too small for a transform.
    """
    train, framing = parts.train.manifest, framing_of(config)
    readers: dict[int, Reader] = {
        id(shards): load_resident(shards, framing, device, train.image_mode, config.on_bad_image)
        if mode == "resident"
        else StreamReader(shards, framing, train.image_mode, config.on_bad_image)
        for shards in opened_sets(parts)
    }
    train_reader, held_out_reader, final_reader = (
        readers[id(part.shards)] for part in (parts.train, parts.held_out, parts.final)
    )
    height, width, _ = train_reader.image_shape
    for entry in config.augment:
        if min(height, width) < smallest_side(entry):
            raise InputError(
                f"data.augment: {entry['name']} with these options needs images of at least "
                f"{smallest_side(entry)} pixels a side, but these are {width}x{height}"
            )
    normalize = make_normalize(config, train, train_reader.image_shape, device)
    return Data(
        **vars(parts),
        train_reader=train_reader,
        held_out_reader=held_out_reader,
        final_reader=final_reader,
        normalize=normalize,
    )


def train_batches(
    recipe: ResolvedRecipe, accelerator: Accelerator | PartialState, loaded: Data, plan: Plan
) -> TrainBatches:
    """Build the iterator over this rank's share of the training set, in the recipe's order."""
    return TrainBatches(
        loaded.train_reader,
        training_orders(recipe.data, loaded.train, loaded.strata, recipe.run.seed),
        global_batch_size=plan.global_batch_size,
        samples_per_epoch=plan.samples_per_epoch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_micro_batch=recipe.train.max_micro_batch,
        transforms=build_transforms([entry for entry in recipe.data.augment if entry["name"] != RANDOM_CROP]),
        normalize=loaded.normalize,
        memory_format=MEMORY_FORMATS[recipe.train.memory_format],
        device=accelerator.device,
        workers=_reader_threads(recipe, loaded.train_reader),
        mixing=build_mixing(recipe.data.augment, distance=recipe.data.repeats),
        part=loaded.train,
    )


def make_test_batches(
    recipe: ResolvedRecipe, accelerator: Accelerator, reader: Reader, part: Part, normalize: Normalize
) -> TestBatches:
    """Return a function that starts a pass over this rank's share of what is evaluated on."""
    return lambda: test_batches(
        reader,
        part.all_ids(),
        batch_size=recipe.eval.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        normalize=normalize,
        memory_format=MEMORY_FORMATS[recipe.train.memory_format],
        device=accelerator.device,
        workers=_reader_threads(recipe, reader),
    )


def _reader_threads(recipe: ResolvedRecipe, reader: Reader) -> int:
    return recipe.data.workers if isinstance(reader, StreamReader) else 0


def make_normalize(
    config: DataConfig, manifest: Manifest, image_shape: tuple[int, int, int], device: torch.device
) -> Normalize:
    """Build the normalisation of data.normalize, for images of shape (height, width, channels).

    Raises:
        InputError: the numbers of channels differ.
    """
    return Normalize(*mean_and_std(config, manifest), image_shape, device)


def mean_and_std(config: DataConfig, manifest: Manifest) -> tuple[list[float], list[float]]:
    """Return data.normalize's mean and std per channel, on the 0..1 scale; `manifest` means the training set's statistics.

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
    return mean, std


def _short(manifest: Manifest) -> str:
    return f"{len(manifest.classes)} ({listed(manifest.classes, most=3)})"


def _class_difference(one: Manifest, other: Manifest, one_name: str, other_name: str) -> str:
    """Say which names only one of two sets has; if there are none, the first label that has another name in each."""
    pairs = ((one_name, one.classes, other.classes), (other_name, other.classes, one.classes))
    extra = {place: sorted(set(names) - set(others)) for place, names, others in pairs}
    if any(extra.values()):
        return ", ".join(f"only {place} has {listed(names, most=3)}" for place, names in extra.items() if names)
    label = next(label for label, name in enumerate(one.classes) if name != other.classes[label])
    return f"label {label} is {listed([one.classes[label]])} in one and {listed([other.classes[label]])} in the other"
