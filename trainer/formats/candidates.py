"""The compute formats that fit a recipe, a model and a processor, the best guess first."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from shardstep.configs.errors import InputError
from shardstep.configs.schema import Convolutions, MemoryFormat, Precision, TrainConfig
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, excludes, gains
from shardstep.trainer.machine import Cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_UNFOLD_PAYS_ON = ("AVX-512", "AMX")  # bf16 units for which oneDNN's weight gradients of small maps are slow


@dataclass(frozen=True)
class ComputeFormat:
    """A precision, a memory format and a convolution method."""

    precision: Precision
    memory_format: MemoryFormat
    convolutions: Convolutions = "direct"

    def __str__(self) -> str:
        method = [] if self.convolutions == "direct" else [self.convolutions]
        return " ".join([self.precision, self.memory_format, *method])


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
