"""What training and evaluation read: a recipe and a data set in, the images and labels at places of an epoch out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from shardstep.configs.errors import InputError
from shardstep.configs.held_out import held_out_share
from shardstep.configs.resolve import Choices, ResolvedRecipe, resolve, with_keys
from shardstep.configs.schema import Recipe
from shardstep.datasets.augment import Labels
from shardstep.datasets.batches import MicroBatch, TrainBatches
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.parts import Part, hold_out
from shardstep.datasets.training_order import open_strata
from shardstep.trainer import data
from shardstep.trainer.optim.losses import class_shares
from shardstep.trainer.optim.plan import make_plan


@dataclass(frozen=True)
class SeenImages:
    """The images at places of an epoch that follow each other.

    Attributes:
        positions: global positions in the epoch.
        keys: of the samples.
        labels: the share of each class in each image, first those of the sample itself, then those of the one that mixup or
            cutmix added.
        trained: uint8 (N, height, width, channels), as the network gets them in training, before they are normalised.
        evaluated: uint8 (N, height, width, channels), the same samples as evaluation reads them.
    """

    positions: list[int]
    keys: list[str]
    labels: list[dict[str, float]]
    trained: np.ndarray
    evaluated: np.ndarray


def see_images(
    world: PartialState, recipe: Recipe, folder: str, epoch: int, start: int, count: int | None, most: int
) -> SeenImages:
    """Read images as training with a checked recipe reads them from the shards in a folder, on any number of ranks.

    Args:
        world: of one process.
        folder: takes the place of data.train. What the recipe holds out of it is left out.
        start: the first position.
        count: number of images; None: as many as the epoch has, but `most` at most.

    Raises:
        InputError: the folder holds no shards, the recipe does not fit them, or the epoch has no such positions.
    """
    recipe = with_keys(recipe, data={"train": folder, "mix": []})
    parts = _training_set(recipe, folder)
    plan = make_plan(recipe.train, parts.train.samples, recipe.data.last_batch == "drop", world_size=1)
    stop = start + count if count is not None else min(start + most, plan.samples_per_epoch)
    if not 0 <= start < stop <= plan.samples_per_epoch:
        raise InputError(
            f"positions {start} to {max(start, stop - 1)} are outside an epoch of {plan.samples_per_epoch} samples"
        )
    resolved = _resolved(recipe, parts, stop - start)
    loaded = data.load(resolved.data, resolved.data.mode, parts, world.device)
    batches = data.train_batches(resolved, world, loaded, plan)

    classes, shards = parts.train.manifest.classes, parts.train.shards
    images, ids, labels = list[Tensor](), list[int](), list[dict[str, float]]()
    for batch in _micro_batches(batches, epoch, start, stop):
        wanted = slice(max(0, start - int(batch.positions[0])), stop - int(batch.positions[0]))
        images.append(loaded.normalize.undo(batch.images[wanted]).cpu())
        ids += batch.sample_ids[wanted].tolist()
        labels += _by_name(batch.labels[wanted], classes)
    keys = [shards.key(sample_id) for sample_id in ids]
    evaluated, _ = loaded.train_reader.read(np.array(ids))
    return SeenImages(list(range(start, stop)), keys, labels, torch.cat(images).numpy(), evaluated.cpu().numpy())


def _training_set(recipe: Recipe, folder: str) -> data.Parts:
    """Open the training set as open_parts does, without what it would be evaluated on."""
    train = Part(open_shards(folder))
    share = held_out_share(recipe.data)
    if share is not None:
        train, _ = hold_out(train.shards, share, recipe.data.split_seed)
    return data.Parts(train, train, train, "validation", "validation", strata=open_strata(recipe.data, train))


def _resolved(recipe: Recipe, parts: data.Parts, count: int) -> ResolvedRecipe:
    """Make the choices that have an effect on the images as a run makes them, and read no more than is drawn."""
    recipe = with_keys(recipe, data={"workers": 0}, train={"max_micro_batch": count + count % 2})
    chosen = data.choose_order_version(recipe.data), data.choose_crop_version(recipe.data, parts)
    return resolve(recipe, Choices("stream", "cpu", "fp32", "contiguous", "direct", *chosen))


def _micro_batches(batches: TrainBatches, epoch: int, start: int, stop: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches that hold positions [start, stop) of an epoch.

    Global batches begin where training begins them: mixup and cutmix take the partner from there.
    """
    begin = start - start % batches.global_batch_size
    for global_batch in batches.from_position(epoch, begin):
        for batch in global_batch.micro_batches:
            if batch.positions[-1] >= start:
                yield batch
            if batch.positions[-1] >= stop - 1:
                return


def _by_name(labels: Labels, classes: list[str]) -> list[dict[str, float]]:
    """Return the shares of the classes of each image by name, without those that are 0."""
    shares = class_shares(labels, len(classes)).cpu()
    own = class_shares(labels if isinstance(labels, Tensor) else labels.own, len(classes)).cpu()
    orders = (2 * (own > 0) + shares).argsort(dim=1, descending=True, stable=True)  # own ones first
    return [
        {classes[label]: float(row[label]) for label in order.tolist() if row[label] > 0}
        for row, order in zip(shares, orders, strict=True)
    ]
