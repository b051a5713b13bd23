"""A fifth of CIFAR-10's training images, the first 1,000 of each class, and its test images."""

import numpy as np

from shardstep.datasets.sources import open_source
from shardstep.datasets.sources.source import Source


def ten_thousand(split: str, *, of_each_class: int = 1000) -> Source:
    source = open_source("cifar10", split)
    if split == "test":
        return source
    numbers = [np.flatnonzero(source.labels == label)[:of_each_class] for label in range(len(source.classes))]
    return source.only(np.sort(np.concatenate(numbers)))
