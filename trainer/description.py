"""The lines printed before a run's first step: what it will do, with the formulas behind derived numbers."""

from importlib import metadata

import torch
from torch import nn

from shardstep.configs.cores import usable_cores
from shardstep.configs.schema import DataConfig
from shardstep.configs.selection import WeightTable, mix_of, sampling_of
from shardstep.configs.text import count, duration
from shardstep.datasets.batches import micro_pieces
from shardstep.datasets.mix import MixedShards, set_parts
from shardstep.datasets.order import window_of
from shardstep.trainer.data import (
    Parts,
    data_warnings,
    folders_of,
    held_out_text,
    other_mode_note,
    whole_jpegs_note,
)
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.gradients import describe_gradient_sync
from shardstep.trainer.models.batch_norm import SyncBatchNorm2d
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.run import Run

INDENT = 13  # width of the column of names
_FEW_SAMPLES = 4


def describe(run: Run) -> list[str]:
    """Return the lines to print before the first step of a run."""
    recipe, plan = run.recipe, run.plan
    train, device = run.data.train.manifest, run.accelerator.device
    height, width, channels = run.data.train_reader.image_shape
    parameters = list(run.state.module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    ranks = count(plan.world_size, "rank")
    processor = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {count(torch.get_num_threads(), 'thread')} a rank"
    )
    measured = f" ({run.measured})" if run.measured else ""
    method = recipe.train.convolutions
    by_method = "" if method == "direct" else f", convolutions by {method}"
    groups = "".join(
        f"; {entry.get('match') or str(entry['ndim']) + '-dimensional'}: {entry.get('name', recipe.optimizer['name'])}, "
        f"lr {entry.get('lr', run.base_lr):g}"
        for entry in recipe.optimizer["groups"]
    )
    parts = run.data.distinct
    data_notes = dict.fromkeys(other_mode_note(train, name, part.manifest) for name, part in run.data.evaluated.items())
    data_notes[whole_jpegs_note(recipe.data, run.data)] = None
    remaining_s = run.time_limit.remaining_s()
    facts = [
        ("world", f"{ranks}, {processor}"),
        (
            "data",
            f"{' + '.join(f'{part.samples:,}' for part in parts)} images {width}x{height}x{channels}, "
            f"{count(run.data.num_classes, 'class', 'classes')}, {recipe.data.mode}; order: lanes {recipe.data.lanes}, "
            f"window {_window_text(run)}, version {recipe.data.order_version}",
        ),
        ("shards", ", ".join(folders_of(recipe.data).values())),
        *(("an epoch", text) for text in _epoch_lines(recipe.data, run.data)),
        *([("held out", held_out_text(recipe.data, run.data))] if "validation" in run.data.evaluated else []),
        ("model", f"{recipe.model['name']}, {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained"),
        ("optimizer", f"{recipe.optimizer['name']}, lr {run.base_lr:g}, {recipe.schedule['name']}{groups}"),
        (
            "precision",
            f"{recipe.train.precision}, {recipe.train.memory_format}{by_method}{measured}",
        ),
        ("batch", batch_text(plan, recipe.train.max_micro_batch)),
        *([("gradients", describe_gradient_sync(recipe.train, run.state.module))] if plan.world_size > 1 else []),
        ("duration", duration_text(plan)),
        *([("time", f"the allocation ends in {duration(remaining_s)}")] if remaining_s is not None else []),
        *(("note", text) for text in data_notes if text),
        *(("note", text) for text in _batch_norm_notes(run.state.module, plan)),
    ]
    headline = (
        f"shardstep {metadata.version('shardstep')} on torch {torch.__version__}: {recipe.run.name}, in {run.dir.path}"
    )
    return [headline, *(f"{'  ' + name:<{INDENT}}{text}" for name, text in facts)]


def _window_text(run: Run) -> str:
    """Return the window of the order, in shards; of a mix, that of each set."""
    shards = run.data.train.shards
    sets = shards.sets if isinstance(shards, MixedShards) else (shards,)
    windows = [window_of(run.recipe.data.window_shards, one.manifest.bytes, len(one.manifest.shards)) for one in sets]
    return " + ".join(str(window or "all") for window in (windows if any(windows) else windows[:1]))


def _epoch_lines(config: DataConfig, parts: Parts) -> list[str]:
    """Say how often samples come in an epoch, if not each of them once."""
    lines, mix, sampling, samples = [], mix_of(config), sampling_of(config), parts.train.samples
    if mix:
        for entry, (part, _) in zip(mix, set_parts(parts.train), strict=True):
            share = entry.weight / sum(other.weight for other in mix)
            lines.append(
                f"{share:.1%} of {samples:,} samples from {entry.dir}, which is {share * samples / part.samples:.2f} times "
                f"its {part.samples:,}"
            )
    if isinstance(sampling, WeightTable):
        lines.append(f"samples come in proportion to their weights in {sampling.path}")
    elif sampling:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in sampling.weights.items())
        lines.append(
            f"classes come in these shares: {weights}, others 1" if weights else "each class comes equally often"
        )
    if config.repeats > 1:
        lines.append(f"{-(-samples // config.repeats):,} samples, each {config.repeats} times in a row")
    return lines


def warnings_about(run: Run) -> list[str]:
    """Return the lines to warn with before the first step: what may not be what the recipe's author wants."""
    threads, asked = torch.get_num_threads(), run.recipe.train.threads
    found = []
    ignored = launch_env.ignored_precision()
    if ignored and ignored != run.recipe.train.precision:
        found.append(
            f"accelerate launch was given the precision {ignored}, which has no effect: train.precision decides, and is "
            f"{run.recipe.train.precision}"
        )
    if run.accelerator.is_main_process:
        found += data_warnings(run.recipe.data, run.data, run.objective.reconstructs)
    if asked is not None and asked > threads:
        found.append(
            f"train.threads={asked}, but each rank uses {count(threads, 'thread')}: its share of the cores here "
            f"({usable_cores()})"
        )
    return found + _small_batch_norm_warnings(run.state.module, run.plan, run.recipe.train.max_micro_batch)


def batch_text(plan: Plan, max_micro_batch: int) -> str:
    """Return the arithmetic behind the global batch: ranks, micro-steps and the size of these."""
    largest = min(-(-plan.global_batch_size // plan.world_size), max_micro_batch)
    return (
        f"{plan.global_batch_size} = {count(plan.world_size, 'rank')} x {count(plan.micro_steps, 'micro-step')} "
        f"of at most {largest}"
    )


def duration_text(plan: Plan) -> str:
    """Return the duration of a run, with the arithmetic behind its steps where it counts epochs."""
    limit = f", or {plan.max_train_s:g} s of training" if plan.max_train_s is not None else ""
    if plan.duration.unit == "steps":
        return f"{plan.duration}{limit}"
    per_epoch = f"ceil({plan.samples_per_epoch:,} / {plan.global_batch_size}) = {plan.steps_per_epoch} per epoch"
    return f"{plan.duration} = {plan.duration_steps} steps of {per_epoch}{limit}"


def _small_batch_norm_warnings(module: nn.Module, plan: Plan, max_micro_batch: int) -> list[str]:
    """Warn about batch norm over so few samples that their mean and variance say little about the data."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return []
    size, ranks = plan.global_batch_size, plan.world_size
    pieces = [micro_pieces(size, rank, ranks, max_micro_batch) for rank in range(ranks)]
    sizes = [[stop - start for start, stop in of_all if stop > start] for of_all in zip(*pieces, strict=True)]
    by_rank, over_ranks = min(map(min, sizes)), min(map(sum, sizes))  # in the smallest micro-step of a global batch
    synchronised = any(isinstance(layer, SyncBatchNorm2d) for layer in layers)
    smallest = over_ranks if synchronised else by_rank
    if smallest > _FEW_SAMPLES:
        return []
    if over_ranks > _FEW_SAMPLES:
        remedy = f"model.sync_batch_norm=true normalises over all ranks' {over_ranks}; fewer ranks help as well"
    elif plan.micro_steps > 1:
        remedy = "give a larger train.max_micro_batch"
    else:
        remedy = "give a larger train.global_batch_size"
    return [f"batch norm normalises over micro-batches of {count(smallest, 'sample')}, too few to learn from: {remedy}"]


def _batch_norm_notes(module: nn.Module, plan: Plan) -> list[str]:
    """Explain batch norm's statistics, which depend on how the global batch is split."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not layers:
        return []
    found = []
    if plan.world_size > 1 and not any(isinstance(layer, SyncBatchNorm2d) for layer in layers):
        found.append("batch norm normalises over each rank's samples; model.sync_batch_norm=true: over all ranks'")
    if plan.micro_steps > 1:
        found.append(
            f"batch norm normalises over each of the {plan.micro_steps} micro-steps, not over the global batch"
        )
    return found
