"""Choose the precision, memory format and convolution method: those of the recipe, or the fastest of a measured step."""

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.schema import Convolutions, MemoryFormat, Precision, TrainConfig
from shardstep.trainer import machine
from shardstep.trainer.distributed.collectives import broadcast_object, raise_on_all_ranks
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, convert_convolutions, excludes, gains
from shardstep.trainer.machine import Cpu
from shardstep.trainer.models.batch_norm import convert_batch_norm
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.losses import Objective
from shardstep.trainer.optim.plan import Plan

if TYPE_CHECKING:
    from shardstep.trainer.data import Data

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_UNFOLD_PAYS_ON = ("AVX-512", "AMX")  # bf16 units for which oneDNN's weight gradients of small maps are slow
_FAR_BEHIND = (3.0, 1.2, 1.1, 1.1)  # times the best, after each round; the first round includes setup, and says little
_MEASURED_SAMPLES = 32  # enough work to tell the formats apart, in a fraction of a second


@dataclass(frozen=True)
class ComputeFormat:
    """A precision, a memory format and a convolution method."""

    precision: Precision
    memory_format: MemoryFormat
    convolutions: Convolutions = "direct"

    def __str__(self) -> str:
        method = [] if self.convolutions == "direct" else [self.convolutions]
        return " ".join([self.precision, self.memory_format, *method])


def resolve_precision(
    world: PartialState,
    config: TrainConfig,
    module: nn.Module,
    objective: Objective,
    data: "Data",
    plan: Plan,
    display: Display,
) -> tuple[ComputeFormat, dict[ComputeFormat, float]]:
    """Choose on rank 0, for all ranks, what the train section leaves to `auto`. All ranks.

    Returns:
        The choice, and the measured seconds per step of each candidate; empty where there was nothing to measure.

    Raises:
        InputError: the device, the processor or the model cannot use what the recipe asks for.
    """
    cpu = machine.read_cpu()
    with raise_on_all_ranks(world):
        found = candidates(config, module, data.image_shape, world.device, cpu)
    found = broadcast_object(world, found)  # hosts may differ
    size = min(max(plan.global_batch_size // plan.world_size, 1), config.max_micro_batch, _MEASURED_SAMPLES)
    seconds: dict[ComputeFormat, float] = {}
    with raise_on_all_ranks(world):
        if len(found) > 1 and world.is_main_process:
            seconds = measure(found, module, objective, *data.first_samples(size, world.device))
    chosen: ComputeFormat = broadcast_object(world, min(found, key=lambda one: seconds.get(one, 0)))
    with raise_on_all_ranks(world):
        warning = check_precision(chosen.precision, world.device, module, cpu)
    if warning:
        display.warn(warning)
    _warn_of_missing_method(world, chosen, display)
    return chosen, seconds


def _warn_of_missing_method(world: PartialState, chosen: ComputeFormat, display: Display) -> None:
    """Warn if this machine lacks the convolution method, as after a resume elsewhere; torch's replaces it then. All ranks."""
    method = CONVOLUTION_METHODS.get(chosen.convolutions)
    lacking = method.missing() if method else None
    text = f"train.convolutions={chosen.convolutions} needs {lacking}: falling back to torch's convolutions"
    if broadcast_object(world, lacking is not None):
        display.warn(text)
    elif lacking:
        display.tell(f"warning: rank {world.process_index}: {text} on this rank")


def check_precision(precision: str, device: torch.device, module: nn.Module, cpu: Cpu) -> str | None:
    """Check that a device can train a model in a precision; return a warning, if there is reason for one.

    Raises:
        InputError: the device cannot train the model in this precision.
    """
    has_lstm = any(isinstance(layer, nn.LSTM) for layer in module.modules())
    # oneDNN has a bf16 LSTM only for AVX-512 and above; elsewhere torch would raise in the first step.
    lacks_bf16_lstm = cpu.vectors in ("AVX", "AVX2")
    if has_lstm and device.type == "cpu" and (precision == "fp16" or (precision == "bf16" and lacks_bf16_lstm)):
        others = "fp32" if lacks_bf16_lstm else "bf16 or fp32"
        raise InputError(
            f"train.precision={precision}: torch has no LSTM in {precision} on this CPU; use {others}, or model.cell=gru"
        )
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"train.precision=bf16: {torch.cuda.get_device_name(device)} has no bf16 units; use fp16 or auto"
        )
    if device.type == "cpu" and precision == "fp16":
        return "train.precision=fp16 on a CPU is for testing the scaler: it is slower than fp32; bf16 is the fast precision"
    return None


def halve(module: nn.Module, precision: str) -> None:
    """Convert a model's weights to bf16 or fp16, and its input images, too. Batch norm keeps fp32, which its sums need."""
    dtype = DTYPES[precision]
    for part in module.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def candidates(
    config: TrainConfig, module: nn.Module, image_shape: tuple[int, int, int], device: torch.device, cpu: Cpu
) -> list[ComputeFormat]:
    """Return the formats to choose from, the best guess first; a single one is the choice.

    On a CPU without bf16 units, bf16 is no candidate: it would take 15 times as long.

    Raises:
        InputError: this device, processor or model cannot use the method of train.convolutions, or does not gain from it.
    """
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    formats: list[MemoryFormat] = ["channels_last", "contiguous"] if convolves else ["contiguous"]
    if config.memory_format != "auto":
        formats = [config.memory_format]
    precisions: list[Precision] = ["fp32"] if cpu.vectors and not cpu.bf16_units else ["bf16", "fp32"]
    if config.precision != "auto":
        precisions = [config.precision]
    elif device.type == "cuda":
        precisions = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    if device.type == "cuda":
        formats = formats[:1]  # a GPU with half precision is fastest with it and channels_last: nothing to measure
    choices = [ComputeFormat(p, f) for p in precisions for f in formats]
    if config.convolutions == "direct":
        return choices
    if config.convolutions != "auto":
        fitting = _check_method(config, module, image_shape, device, precisions)
        return [ComputeFormat(precision, layout, config.convolutions) for precision in fitting for layout in formats]

    def can_gain(method: str) -> bool:
        fits = device.type == "cpu" and "channels_last" in formats and not excludes(config, method)
        return fits and gains(module, image_shape, method) and not CONVOLUTION_METHODS[method].missing()

    if cpu.bf16_units in _UNFOLD_PAYS_ON and can_gain("unfold"):
        place = choices.index(ComputeFormat("bf16", "channels_last"))
        choices[place] = replace(choices[place], convolutions="unfold")
    if is_measured(config) and can_gain("winograd"):
        choices += [ComputeFormat(precision, "channels_last", "winograd") for precision in precisions]
    return choices


def _check_method(
    config: TrainConfig,
    module: nn.Module,
    image_shape: tuple[int, int, int],
    device: torch.device,
    precisions: list[Precision],
) -> list[Precision]:
    """Check that the method of train.convolutions can be used; return the precisions in which it can."""
    method = config.convolutions
    if device.type != "cpu":
        raise InputError(f"train.convolutions={method} is for CPUs, and this is {device}: use auto or direct")
    if not gains(module, image_shape, method):
        raise InputError(
            f"train.convolutions={method} has no effect: this model has no 3x3 convolutions that it would make faster"
        )
    supported = CONVOLUTION_METHODS[method].precisions
    fitting = [precision for precision in precisions if precision in supported]
    if not fitting:
        raise InputError(
            f"train.convolutions={method} is for {' and '.join(supported)}, for which this processor has no units: use auto "
            f"or direct"
        )
    return fitting


def is_measured(config: TrainConfig) -> bool:
    """Return whether the recipe leaves a choice to `auto` that is made by measuring steps on a CPU."""
    return "auto" in (config.precision, config.memory_format)


def measure(
    choices: list[ComputeFormat], module: nn.Module, objective: Objective, images: Tensor, labels: Tensor
) -> dict[ComputeFormat, float]:
    """Measure the seconds per forward and backward pass of each choice, on this rank alone; the model does not change.

    The result is the best of a few passes. The choices take turns, so that other work on the machine affects all alike. A
    choice that is far behind drops out: on a CPU without bf16 units, bf16 can take 15 times as long as fp32.
    """
    copies = {compute: _copy_in_format(compute, module, images) for compute in choices}
    seconds = dict.fromkeys(choices, float("inf"))
    with torch.random.fork_rng():  # dropout must not change the run's random numbers
        for far_behind in _FAR_BEHIND:
            for compute, (model, inputs) in copies.items():
                began = time.perf_counter()
                with torch.autocast(images.device.type, DTYPES[compute.precision], enabled=compute.precision != "fp32"):
                    outputs = model(inputs)
                objective.loss(outputs, inputs, labels).backward()
                seconds[compute] = min(seconds[compute], time.perf_counter() - began)
            limit_s = far_behind * min(seconds.values())
            copies = {compute: pair for compute, pair in copies.items() if seconds[compute] <= limit_s}
            if len(copies) == 1:
                break
    return seconds


def _copy_in_format(compute: ComputeFormat, module: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    layout = MEMORY_FORMATS[compute.memory_format]
    model = copy.deepcopy(module).to(memory_format=layout).train()
    if compute.convolutions in CONVOLUTION_METHODS:
        convert_convolutions(model, compute.convolutions)
    convert_batch_norm(model, synchronised=False)  # the other ranks do not take part
    return model, images.contiguous(memory_format=layout)
