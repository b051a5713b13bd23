"""Checkpoints: write a TrainState to disk and load it again.

The weights are safetensors, the optimizer's state a file that torch reads with weights_only, the rest JSON and YAML. A
checkpoint is written under another name, synced, renamed and read back: it is intact, or it does not exist. Loading one
never executes a pickle.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shardstep.configs.durations import Progress
from shardstep.configs.errors import InputError
from shardstep.configs.files import sync_to_disk, write_atomically
from shardstep.trainer.checkpoints import checkpoint_files
from shardstep.trainer.checkpoints.checkpoint_files import (
    AVERAGE,
    BUFFERS,
    OPTIMIZER,
    RECIPE,
    STATE,
    WEIGHTS,
    problems_of,
)
from shardstep.trainer.distributed.buffers import set_buffers, split_buffers
from shardstep.trainer.state import TrainState

_LOAD_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, UnpicklingError, SafetensorError)
_NOT_PLAIN_JSON = ("module", "model", "optimizer", "scaler", "average", "progress")  # stored in other forms
_FACTS = tuple(f.name for f in fields(TrainState) if f.name not in _NOT_PLAIN_JSON)


@dataclass(frozen=True)
class Snapshot:
    """A TrainState at one step, copied to the host, so that the run can continue while a thread writes it."""

    step: int
    world_size: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    facts: dict[str, Any]
    recipe: str
    rank_buffers: Tensor | None


def take_snapshot(
    state: TrainState, recipe: str, world_size: int, rank_buffers: Tensor | None, evaluated: Mapping[str, Tensor] | None
) -> Snapshot:
    """Copy a state, between two steps, to the host.

    Args:
        rank_buffers: (world_size, n), each rank's floating-point buffers if they differ; the weights get their mean.
        evaluated: the parameters that are evaluated, by name, if they are not those that are trained.
    """
    kept = weights(state.module)
    if rank_buffers is not None:
        kept |= split_buffers(state.module, rank_buffers.mean(dim=0))
    facts = {name: getattr(state, name) for name in _FACTS}
    facts["progress"] = asdict(state.progress)
    facts["scaler"] = state.scaler.state_dict() if state.scaler else None
    return Snapshot(
        step=state.progress.step,
        world_size=world_size,
        weights=kept,
        average=None if evaluated is None else _contiguous_on_host(evaluated),
        optimizer=_to_host(state.optimizer.state_dict()),
        facts=json.loads(json.dumps(facts)),  # a copy, too
        recipe=recipe,
        rank_buffers=rank_buffers,
    )


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write a checkpoint below `folder` and read it back; keep an intact one of the same step.

    Raises:
        OSError: it could not be written, or was read back differently. Earlier checkpoints are still there.
    """
    target = folder / checkpoint_files.step_name(snapshot.step)
    if target.is_dir() and not problems_of(target):
        return target
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # Not its parents: a run whose disk is gone must not continue below the empty mount point.
    folder.mkdir(exist_ok=True)
    partial.mkdir()
    entries = {}
    for name, content in _files(snapshot):
        (partial / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    checkpoint_files.write_manifest(partial, snapshot.step, snapshot.world_size, entries)
    for path in (*partial.iterdir(), partial):
        sync_to_disk(path)
    if target.exists():  # damaged, and skipped when this run was resumed
        shutil.rmtree(target)
    partial.replace(target)
    sync_to_disk(folder)
    problems = problems_of(target)
    if problems:
        raise OSError(f"{target} was read back differently: {problems[0]}")
    return target


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's parameters and buffers, as contiguous tensors on the host."""
    return _contiguous_on_host(module.state_dict())


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors."""
    write_atomically(path, save(weights(module)))


def load(
    state: TrainState,
    path: Path,
    rank: int,
    world_size: int,
    new_test_set: Literal["allow", "refuse"],
    options: Collection[str],
) -> None:
    """Restore a state from an intact checkpoint, in place.

    Args:
        state: a new one, with the fingerprints of the current data sets.
        options: keys of the optimizer's parameter groups whose values are those of the recipe, which may have changed.
        new_test_set: whether the test set may have changed; the best evaluation so far is forgotten then.

    Raises:
        InputError: the checkpoint does not fit the model, the optimizer or the data sets.
    """
    try:
        facts = json.loads((path / STATE).read_bytes())
        progress, scaler = Progress(**facts.pop("progress")), facts.pop("scaler")
        facts.setdefault("evaluating_s", 0.0)  # only matters with train.max_wall_s
        facts.setdefault("patience", None)  # only matters with train.stop_when
        facts.setdefault("bad_images", 0)  # earlier versions skipped none, and named none
        facts.setdefault("first_bad_images", [])
        values = {name: facts[name] for name in _FACTS}
        optimizer = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
        _load_optimizer(state.optimizer, optimizer, options)
        if state.scaler is not None and scaler:
            state.scaler.load_state_dict(scaler)
        state.module.load_state_dict(load_file(path / WEIGHTS))
        if state.average is not None:  # a run that kept none until now begins it with the weights
            kept = load_file(path / AVERAGE) if (path / AVERAGE).is_file() else state.module.state_dict()
            for name, value in state.average.items():
                value.copy_(kept[name])
        if (path / BUFFERS).is_file():
            every = load_file(path / BUFFERS)["buffers"]
            if len(every) == world_size:  # another number of ranks uses their mean, which the weights hold
                set_buffers(state.module, every[rank])
    except _LOAD_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be resumed from: {reason}") from None
    if values["fingerprint"] != state.fingerprint:
        raise InputError(
            f"{path} was trained on another data set, or with other weights in the file of data.sampling (fingerprint "
            f"{values['fingerprint'][:12]}), than the recipe has now ({state.fingerprint[:12]}): give another run.dir"
        )
    if values["test_fingerprint"] != state.test_fingerprint:
        if new_test_set == "refuse":
            raise InputError(
                f"{path} was evaluated on another test set (fingerprint {values['test_fingerprint'][:12]}) than data.test "
                f"is now ({state.test_fingerprint[:12]}), so its results cannot be compared with new ones. Give another "
                f"run.dir, or continue with 'run.allow_changes=[data.test]', which forgets the best evaluation so far"
            )
        values |= {"test_fingerprint": state.test_fingerprint, "best": None}
    if len(values["sums"]) != world_size:  # on another number of ranks, rank 0 gets the sums of all
        total = [sum(parts) for parts in zip(*values["sums"], strict=True)] or [0.0, 0.0]
        values["sums"] = [total, *([0.0, 0.0] for _ in range(world_size - 1))]
    state.progress = progress
    for name, value in values.items():
        setattr(state, name, value)


def _load_optimizer(optimizer: AcceleratedOptimizer, saved: dict[str, Any], options: Collection[str]) -> None:
    """Load an optimizer's state, but keep its options."""
    kept = [{key: group[key] for key in options if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of a safetensors file; of a checkpoint with an average, the average. On the CPU, by name."""
    average = path.with_name(AVERAGE)
    kept = load_file(average) if average.is_file() else {}  # parameters, without buffers
    return load_file(path) | kept


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a safetensors file into a model; from a checkpoint with an average, load the average.

    Raises:
        InputError: the file does not exist, or holds another model.
    """
    try:
        module.load_state_dict(read_weights(path))
    except FileNotFoundError:
        raise InputError(f"no weights in {path.parent}: {path.name} is missing") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not hold this model's weights: {str(error).splitlines()[0]}") from None


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    yield WEIGHTS, save(snapshot.weights)
    if snapshot.average is not None:
        yield AVERAGE, save(snapshot.average)
    stream = io.BytesIO()
    torch.save(snapshot.optimizer, stream)
    yield OPTIMIZER, stream.getvalue()
    yield STATE, (json.dumps(snapshot.facts, indent=1) + "\n").encode()
    yield RECIPE, snapshot.recipe.encode()
    if snapshot.rank_buffers is not None:
        yield BUFFERS, save({"buffers": snapshot.rank_buffers})


def _contiguous_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, value in tensors.items()
    }


def _to_host(value: Any) -> Any:
    """Return a copy of nested containers, with all tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(part) for part in value)
    return value
