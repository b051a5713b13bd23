"""The classes of one data set as those of another: by name, or by number where one of them has no names."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, listed
from shardstep.datasets.class_names import are_whole_numbers
from shardstep.datasets.label_sets import samples_per_class
from shardstep.datasets.manifest import ShardFolder


def map_classes(shards: ShardFolder, known: list[str], where: str) -> tuple[ShardFolder, str | None]:
    """Return a data set with the class list of the one that a model was trained on, and a line on what that changes, if any.

    Classes of one name are one class, in whatever order. If one list has only numbers in a row, as of shards without names,
    and they share no name, labels count as the same in both.

    Args:
        known: the classes that the model knows.
        where: the data set, for messages.

    Raises:
        InputError: there are images of other classes.
    """
    classes, samples = shards.manifest.classes, shards.manifest.samples_per_class
    if classes == known:
        return shards, None
    by_number = _are_numbered(classes) != _are_numbered(known) and set(classes).isdisjoint(known)
    if by_number:
        label_of = {name: label for label, name in enumerate(classes[: len(known)])}
        pairs = [f"{name} as {as_known}" for name, as_known in zip(classes, known, strict=False)]
        notes = [f"one list of classes has numbers only, so labels count as the same in both: {listed(pairs, most=3)}"]
    else:
        number_of = {name: label for label, name in enumerate(known)}
        label_of = {name: number_of[name] for name in classes if name in number_of}
        notes = ["classes are matched by name"]
    unknown = {name: images for name, images in zip(classes, samples, strict=True) if name not in label_of}
    with_images = [f"{name} ({count(images, 'image')})" for name, images in unknown.items() if images]
    if with_images:
        raise InputError(
            f"{where} has images of classes that the model does not know: {listed(with_images)}. It knows {listed(known)}: "
            f"remove these images, or give the classes the names that they have there"
        )
    seen = set(label_of.values())
    missing = [name for label, name in enumerate(known) if label not in seen]
    notes += [f"only the model has {listed(missing)}"] if missing else []
    notes += [f"without images: {listed([*unknown])}"] if unknown else []
    new_labels = np.array([label_of.get(name, 0) for name in classes], dtype=np.uint32)
    return _relabelled(shards, known, new_labels), f"{where} has other classes than the model: {'; '.join(notes)}"


def _are_numbered(classes: Sequence[str]) -> bool:
    """Check whether classes are numbers in a row, such as 0, 1, 2 or 1, 2, 3."""
    return are_whole_numbers(classes) and [int(name) for name in classes] == [
        int(classes[0]) + n for n in range(len(classes))
    ]


def _relabelled(shards: ShardFolder, classes: list[str], new_labels: np.ndarray) -> ShardFolder:
    """Return a data set with other classes; its fingerprint stays that of the files."""
    index, sets = shards.index, shards.label_sets
    if sets is None:
        index = index.copy()
        index["label"] = new_labels[shards.index["label"]]
    else:
        sets = sets.renumbered(new_labels)
    samples = samples_per_class(sets or index["label"], len(classes))
    manifest = replace(shards.manifest, classes=classes, samples_per_class=samples.tolist())
    return replace(shards, index=index, label_sets=sets, manifest=manifest)
