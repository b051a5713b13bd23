"""Choose the precision, memory format and convolution method: those of the recipe, or the fastest of a measured step."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn

from shardstep.configs.components import first_line
from shardstep.configs.errors import InputError
from shardstep.configs.imported import is_import_path
from shardstep.configs.recipe_code import code_of
from shardstep.configs.schema import Recipe
from shardstep.trainer import machine
from shardstep.trainer.distributed.collectives import broadcast_object, raise_on_all_ranks
from shardstep.trainer.formats import measurement
from shardstep.trainer.formats.candidates import DTYPES, ComputeFormat, candidates, is_measured
from shardstep.trainer.formats.kept_answers import Answer, Question, measured_answer
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS
from shardstep.trainer.machine import Cpu
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.losses import Objective
from shardstep.trainer.optim.plan import Plan

if TYPE_CHECKING:
    from shardstep.trainer.data import Data


def resolve_precision(
    world: PartialState,
    recipe: Recipe,
    module: nn.Module,
    objective: Objective,
    data: "Data",
    plan: Plan,
    display: Display,
    measure_anew: bool = False,
) -> tuple[ComputeFormat, Answer | None]:
    """Choose on rank 0, for all ranks, what the train section leaves to `auto`. All ranks.

    Returns:
        The choice, and on rank 0 the measurement that it comes from, if there was anything to measure.

    Raises:
        InputError: the device, the processor or the model cannot use what the recipe asks for.
    """
    cpu = machine.read_cpu()
    with raise_on_all_ranks(world):
        found = candidates(recipe.train, module, data.image_shape, world.device, cpu)
    found = broadcast_object(world, found)  # hosts may differ
    if is_import_path(recipe.model["name"]) and is_measured(recipe.train):
        found = _working(found, recipe, module, objective, data, display)
    answer = None
    with raise_on_all_ranks(world):
        if len(found) > 1 and world.is_main_process:
            batch = min(max(plan.global_batch_size // plan.world_size, 1), recipe.train.max_micro_batch)
            of_model = (recipe.model, recipe.loss, data.image_shape, data.num_classes)
            question = Question(found, *of_model, batch, code_of(recipe).digest)
            answer = measured_answer(
                question, module, objective, lambda count: data.first_samples(count, world.device), measure_anew
            )
    chosen: ComputeFormat = broadcast_object(world, answer.chosen if answer else found[0])
    with raise_on_all_ranks(world):
        warning = check_precision(chosen.precision, world.device, module, cpu)
    if warning:
        display.warn(warning)
    _warn_of_missing_method(world, chosen, display)
    return chosen, answer


def _working(
    found: list[ComputeFormat], recipe: Recipe, module: nn.Module, objective: Objective, data: "Data", display: Display
) -> list[ComputeFormat]:
    """Leave out the formats that an imported model fails in, as `view` does with channels_last. The same on every rank.

    Raises:
        Exception: what the model raises where it works in none.
    """
    plain = ComputeFormat(found[0].precision, "contiguous")
    tried = [*found, *([plain] if recipe.train.memory_format == "auto" and plain not in found else [])]
    device = next(module.parameters()).device
    errors = {
        compute: measurement.works_in(compute, module, objective, partial(data.first_samples, device=device), 2)
        for compute in tried
    }
    failing = {compute: error for compute, error in errors.items() if error is not None}
    working = [compute for compute in found if compute not in failing] or [one for one in tried if one not in failing]
    if not working:
        raise failing[tried[-1]]
    for compute, error in failing.items():
        display.note(f"{recipe.model['name']} does not work in {compute}: {first_line(error)}")
    return working


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
