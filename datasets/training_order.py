"""The training part and the data section of a recipe to the global order: sampling, mix, repeats, lanes and windows."""

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import ResolvedDataConfig
from shardstep.configs.schema import DataConfig
from shardstep.configs.selection import mix_of, sampling_of
from shardstep.datasets.manifest import ShardFolder, open_shards
from shardstep.datasets.mix import MixedOrders, MixedShards, mix_shards, set_parts
from shardstep.datasets.order import OrderConfig, Orders, window_of
from shardstep.datasets.parts import Part
from shardstep.datasets.rng import derived_seed
from shardstep.datasets.sampling import RepeatedOrders, Sampling, Strata, strata_of

_SETS = 5  # a stream of random numbers, for the seeds of a mix's sets


def open_training_set(config: DataConfig) -> ShardFolder:
    """Open data.train, or all sets of data.mix as one.

    Raises:
        InputError: one cannot be opened, or no set of the mix has all classes.
    """
    mix = mix_of(config)
    return mix_shards([open_shards(entry.dir) for entry in mix]) if mix else open_shards(config.train)


def open_strata(config: DataConfig, train: Part) -> Strata | None:
    """Return the strata of data.sampling, after checking that something is drawn from each set of a mix.

    Raises:
        InputError: the weights do not fit the samples to train on, or of a set nothing would be drawn.
    """
    strata = strata_of(train, sampling_of(config))
    if isinstance(train.shards, MixedShards):
        for part, numbers in set_parts(train):
            drawn = part.samples > 0 if strata is None else strata.of_samples(numbers).are_drawn
            if not drawn:
                raise InputError(f"data.mix: nothing of {part.shards.path} is left to train on: take it out of the mix")
    return strata


def training_orders(config: ResolvedDataConfig, train: Part, strata: Strata | None, seed: int) -> Orders:
    """Return the global order of a recipe's training samples.

    An epoch has as many positions as `train` has samples; with repeats, it draws that many divided by the repeats, rounded
    up, and the copies of the last one may be fewer.
    """
    draws = -(-train.samples // config.repeats)
    once: Orders
    if isinstance(train.shards, MixedShards):
        sets = set_parts(train)
        once = MixedOrders(
            seed,
            tuple(
                _order_of_one(
                    config, part, strata and strata.of_samples(numbers), derived_seed(seed, _SETS, number), part.samples
                )
                for number, (part, numbers) in enumerate(sets)
            ),
            samples_per_set=tuple(part.samples for part, _ in sets),
            first_ids=tuple(train.shards.first_ids[:-1]),
            first_shards=tuple(train.shards.first_shards[:-1]),
            weights=tuple(entry.weight for entry in mix_of(config)),
            samples_per_epoch=draws,
        )
    else:
        once = _order_of_one(config, train, strata, seed, draws)
    return once if config.repeats == 1 else RepeatedOrders(once, config.repeats)


def _order_of_one(config: ResolvedDataConfig, part: Part, strata: Strata | None, seed: int, draws: int) -> OrderConfig:
    """Return the order of one data set, of which each epoch draws so many samples."""
    manifest = part.manifest
    each_once = strata is None and draws == part.samples
    return OrderConfig(
        part.samples_per_shard,
        seed,
        config.lanes,
        window_of(config.window_shards, manifest.bytes, len(manifest.shards)),
        config.order_version,
        part.ids,
        None if each_once else Sampling(part, strata, draws, seed),
    )
