"""In which number format and memory layout to compute, and how: as asked for, or as a measured step shows to be best."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_UNFOLD_PAYS_ON = ("AVX-512", "AMX")  # bf16 units whose kernel for weight gradients on small maps is slow in oneDNN
_FAR_BEHIND = (3.0, 1.2, 1.1, 1.1)  # after each round; the first one sets things up, and says little
PROBE_SAMPLES = 32  # enough work to tell the formats apart, little enough to take a fraction of a second


@dataclass(frozen=True)
class ComputeFormat:
    """A number format, a memory layout, and a method for convolutions."""

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
    image_shape: tuple[int, int, int],
    first_samples: Callable[[int], tuple[Tensor, Tensor]],
    plan: Plan,
    display: Display,
) -> tuple[ComputeFormat, dict[ComputeFormat, float]]:
    """Choose on rank 0, for all ranks, what the train section leaves to `auto`. All ranks.

    Args:
        world: for its device.
        config: the train section, validated.
        module: the model with its first weights.
        objective: whose gradient is measured.
        image_shape: (channels, height, width).
        first_samples: normalized images and labels of some samples, on the device.
        plan: for the size of a rank's batch.
        display: for warnings.

    Returns:
        The choice, and the measured seconds per step of each candidate; empty where there was nothing to measure.

    Raises:
        InputError: the device, the processor or the model cannot use what is asked for.
    """
    cpu = machine.read_cpu()
    with raise_on_all_ranks(world):
        found = candidates(config, module, image_shape, world.device, cpu)
    found = broadcast_object(world, found)  # hosts may differ
    size = min(max(plan.global_batch_size // plan.world_size, 1), config.max_micro_batch, PROBE_SAMPLES)
    seconds: dict[ComputeFormat, float] = {}
    with raise_on_all_ranks(world):
        if len(found) > 1 and world.is_main_process:
            seconds = measure(found, module, objective, *first_samples(size))
    chosen: ComputeFormat = broadcast_object(world, min(found, key=lambda one: seconds.get(one, 0)))
    with raise_on_all_ranks(world):
        warning = check_precision(chosen.precision, world.device, module, cpu)
    if warning:
        display.warn(warning)
    _tell_what_is_missing(world, chosen, display)
    return chosen, seconds


def _tell_what_is_missing(world: PartialState, chosen: ComputeFormat, display: Display) -> None:
    """Where a method for convolutions cannot be had, on a run that goes on elsewhere, say, torch's takes its place."""
    method = CONVOLUTION_METHODS.get(chosen.convolutions)
    lacking = method.missing() if method else None
    text = f"train.convolutions={chosen.convolutions} needs {lacking}: convolutions are torch's"
    if broadcast_object(world, lacking is not None):
        display.warn(text)
    elif lacking:
        display.tell(f"warning: rank {world.process_index}: {text} on this rank")


def check_precision(precision: str, device: torch.device, module: nn.Module, cpu: Cpu) -> str | None:
    """Whether a precision can be had for a model on a device; returns a warning, if there is something to warn of.

    Args:
        precision: fp32, bf16 or fp16.
        device: where the model will be.
        module: the model.
        cpu: of this machine.

    Raises:
        InputError: it cannot be had.
    """
    has_lstm = any(isinstance(layer, nn.LSTM) for layer in module.modules())
    if has_lstm and device.type == "cpu" and (precision == "fp16" or (precision == "bf16" and _lacks_bf16_lstm(cpu))):
        others = "fp32" if _lacks_bf16_lstm(cpu) else "bf16 or fp32"
        raise InputError(
            f"train.precision={precision}: torch has no LSTM in {precision} on this CPU; use {others}, or model.cell=gru"
        )
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"train.precision=bf16: {torch.cuda.get_device_name(device)} has no bf16 units; use fp16 or auto"
        )
    if device.type == "cpu" and precision == "fp16":
        return (
            "train.precision=fp16 on a CPU is for testing the scaler: it is slower than fp32; bf16 is the fast format"
        )
    return None


def _lacks_bf16_lstm(cpu: Cpu) -> bool:
    """oneDNN has one for AVX-512 and above; elsewhere torch would raise in the first step."""
    return cpu.vectors in ("AVX", "AVX2")


def halve(module: nn.Module, precision: str) -> None:
    """Keep a model's weights in a half format, all but batch norm's, whose sums need more; images are converted, too."""
    dtype = DTYPES[precision]
    for part in module.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def candidates(
    config: TrainConfig, module: nn.Module, image_shape: tuple[int, int, int], device: torch.device, cpu: Cpu
) -> list[ComputeFormat]:
    """What can be chosen from, the best guess first; one of it is a settled choice.

    Args:
        config: of the recipe.
        module: the model.
        image_shape: (channels, height, width).
        device: where it will be.
        cpu: of this machine; bf16 is not tried where it is known to have no units for it: it takes 15 times as long.

    Raises:
        InputError: convolutions names a method that this device, processor or model cannot use or does not gain by.
    """
    formats: list[MemoryFormat]
    if config.memory_format != "auto":
        formats = [config.memory_format]
    elif any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        formats = ["channels_last", "contiguous"]
    else:
        formats = ["contiguous"]
    precisions: list[Precision]
    if config.precision != "auto":
        precisions = [config.precision]
    elif device.type == "cuda":
        precisions = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    else:
        precisions = ["fp32"] if cpu.vectors and not cpu.bf16_units else ["bf16", "fp32"]
    if device.type == "cuda":
        formats = formats[:1]  # half precision wins on a GPU that has it, and channels_last with it: nothing to measure
    choices = [ComputeFormat(p, f) for p in precisions for f in formats]
    if config.convolutions == "direct":
        return choices
    if config.convolutions != "auto":
        method = CONVOLUTION_METHODS[config.convolutions]
        if device.type != "cpu":
            raise InputError(
                f"train.convolutions={config.convolutions} is for CPUs, and this is {device}: use auto or direct"
            )
        if not gains(module, image_shape, config.convolutions):
            raise InputError(
                f"train.convolutions={config.convolutions} has no effect: this model has no 3x3 convolutions that "
                f"would be faster by it"
            )
        fitting = [precision for precision in precisions if precision in method.precisions]
        if not fitting:
            raise InputError(
                f"train.convolutions={config.convolutions} is for {' and '.join(method.precisions)}, for which this "
                f"processor has no units: use auto or direct"
            )
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


def is_measured(config: TrainConfig) -> bool:
    """Whether a step is measured on a CPU before the first one."""
    return "auto" in (config.precision, config.memory_format)


def measure(
    choices: list[ComputeFormat], module: nn.Module, objective: Objective, images: Tensor, labels: Tensor
) -> dict[ComputeFormat, float]:
    """Seconds per forward and backward pass of each choice, on this rank alone; the model is left as it is.

    The best of a few passes, taken in turn, so that other work on the machine meets all choices alike. A choice that is
    far behind is tried no further: on a CPU without units for it, bf16 can take 15 times as long as fp32.
    """
    probes = {compute: _probe(compute, module, images) for compute in choices}
    seconds = dict.fromkeys(choices, float("inf"))
    with torch.random.fork_rng():  # dropout must not move the run's random numbers
        for far_behind in _FAR_BEHIND:
            for compute, (model, inputs) in probes.items():
                began = time.perf_counter()
                with torch.autocast(images.device.type, DTYPES[compute.precision], enabled=compute.precision != "fp32"):
                    outputs = model(inputs)
                objective.loss(outputs, inputs, labels).backward()
                seconds[compute] = min(seconds[compute], time.perf_counter() - began)
            limit_s = far_behind * min(seconds.values())
            probes = {compute: probe for compute, probe in probes.items() if seconds[compute] <= limit_s}
            if len(probes) == 1:
                break
    return seconds


def _probe(compute: ComputeFormat, module: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    layout = MEMORY_FORMATS[compute.memory_format]
    model = copy.deepcopy(module).to(memory_format=layout).train()
    if compute.convolutions in CONVOLUTION_METHODS:
        convert_convolutions(model, compute.convolutions)
    convert_batch_norm(model, synchronised=False)  # the other ranks do not take part
    return model, images.contiguous(memory_format=layout)
