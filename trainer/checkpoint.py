"""What must survive a restart, to disk and back.

A checkpoint is a folder checkpoints/step-NNNNNNNN with the weights as safetensors and the rest as a file that torch
reads with weights_only. It is written under another name, synced, and renamed: it is whole, or it does not exist.
"""

import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardstep.configs.durations import Progress
from shardstep.configs.errors import InputError
from shardstep.datasets.cache import sync_to_disk

_WEIGHTS, _REST = "model.safetensors", "state.pt"


@dataclass
class TrainState:
    """All that changes while a run goes on, and must survive its end.

    Random numbers are not among it: augmentation is keyed by (seed, epoch, position), dropout by (seed, step, rank).

    Attributes:
        module: the model, bare.
        model: the same as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        scaler: of fp16, else None.
        progress: how far the run has come.
        fingerprint: of the training set that `progress` counts in.
        wall_s: seconds of training and evaluation, over all restarts.
        restarts: how often the run was resumed.
    """

    module: nn.Module
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scaler: torch.amp.GradScaler | None = None
    progress: Progress = field(default_factory=Progress)
    fingerprint: str = ""
    wall_s: float = 0.0
    restarts: int = 0


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers as contiguous tensors on the host."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def save(state: TrainState, folder: Path, keep: int) -> Path:
    """Write a checkpoint below `folder` and delete all but the newest `keep`. Called on rank 0 only."""
    target = folder / f"step-{state.progress.step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights(state.module), partial / _WEIGHTS)
    rest = {
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict() if state.scaler else {},
        "progress": asdict(state.progress),
        "fingerprint": state.fingerprint,
        "wall_s": state.wall_s,
        "restarts": state.restarts,
    }
    torch.save(rest, partial / _REST)
    for path in (*partial.iterdir(), partial):
        sync_to_disk(path)
    if target.exists():  # the end of a run that was resumed at its end
        shutil.rmtree(target)
    partial.replace(target)
    sync_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(state: TrainState, path: Path) -> None:
    """Restore a state from a checkpoint, in place.

    Raises:
        InputError: it does not fit the model or optimizer, or cannot be read.
    """
    try:
        rest = torch.load(path / _REST, weights_only=True, map_location="cpu")
        fingerprint, progress = rest["fingerprint"], Progress(**rest["progress"])
        wall_s, restarts = float(rest["wall_s"]), int(rest["restarts"])
        state.optimizer.load_state_dict(rest["optimizer"])
        if state.scaler is not None:
            state.scaler.load_state_dict(rest["scaler"])
        state.module.load_state_dict(load_file(path / _WEIGHTS))
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{path} cannot be resumed from: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if fingerprint != state.fingerprint:
        raise InputError(
            f"{path} was trained on another data set (fingerprint {fingerprint[:12]}) than data.train now names "
            f"({state.fingerprint[:12]}): give another run.dir"
        )
    state.progress, state.wall_s, state.restarts = progress, wall_s, restarts + 1


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a safetensors file into a model.

    Raises:
        InputError: there is no such file, or it holds another model.
    """
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise InputError(f"no weights in {path.parent}: {path.name} is missing") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not hold this model's weights: {str(error).splitlines()[0]}") from None
