"""Which number format and memory layout to compute in: as asked for, or whichever a measured step shows to be fastest."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.trainer.losses import Loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_PROBE_SAMPLES = 64  # enough work to tell the formats apart, little enough to take a fraction of a second


@dataclass(frozen=True)
class Compute:
    """A number format (fp32, bf16 or fp16) and a memory layout (contiguous or channels_last)."""

    precision: str
    memory_format: str


def check_precision(precision: str, device: torch.device) -> str | None:
    """Whether a precision can be had on a device; returns a warning, if there is something to warn of.

    Raises:
        InputError: it cannot be had.
    """
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"train.precision=bf16: {torch.cuda.get_device_name(device)} has no bf16 units; use fp16 or auto"
        )
    if device.type == "cpu" and precision == "fp16":
        return (
            "train.precision=fp16 on a CPU is for testing the scaler: it is slower than fp32; bf16 is the fast format"
        )
    return None


def choose_compute(
    precision: str, memory_format: str, model: nn.Module, loss: Loss, batch: tuple[Tensor, Tensor]
) -> tuple[Compute, dict[Compute, float]]:
    """Settle what the recipe leaves to `auto`.

    Args:
        precision, memory_format: of the recipe.
        model: on its device; it is left as it is.
        loss: of training.
        batch: images and labels on the device, at the size of a micro-batch.

    Returns:
        The choice, and the seconds per step that it rests on (empty when there was nothing to choose).
    """
    device = batch[0].device
    has_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    formats = [memory_format] if memory_format != "auto" else ["channels_last", "contiguous"]
    if memory_format == "auto" and not has_images:
        formats = ["contiguous"]
    if precision != "auto":
        precisions = [precision]
    elif device.type == "cuda":
        # Half precision always wins on a GPU that has it, and channels_last goes with it: nothing to measure.
        precisions = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
        formats = formats[:1]
    else:
        precisions = ["bf16", "fp32"]
    candidates = [Compute(p, f) for p in precisions for f in formats]
    if len(candidates) == 1:
        return candidates[0], {}
    seconds = {compute: _seconds_per_step(compute, model, loss, batch) for compute in candidates}
    return min(candidates, key=seconds.__getitem__), seconds


def _seconds_per_step(compute: Compute, model: nn.Module, loss: Loss, batch: tuple[Tensor, Tensor]) -> float:
    """The faster of two forward and backward passes, after one that is not counted."""
    layout = MEMORY_FORMATS[compute.memory_format]
    probe = copy.deepcopy(model).to(memory_format=layout).train()
    images, labels = batch[0][:_PROBE_SAMPLES].contiguous(memory_format=layout), batch[1][:_PROBE_SAMPLES]
    times = []
    with torch.random.fork_rng():  # dropout must not move the run's random numbers
        for _ in range(3):
            began = time.perf_counter()
            with torch.autocast(images.device.type, DTYPES[compute.precision], enabled=compute.precision != "fp32"):
                outputs = probe(images)
            loss(outputs, labels).backward()
            times.append(time.perf_counter() - began)
    return min(times[1:])
