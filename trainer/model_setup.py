"""Set up the model of a run: build and initialize it, set its precision, build its optimizer, wrap it for all ranks."""

import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from shardstep.configs.components import first_line, options_of
from shardstep.configs.errors import InputError
from shardstep.configs.imported import is_import_path, load_function
from shardstep.configs.recipe_code import names_of_code
from shardstep.configs.resolve import ResolvedRecipe
from shardstep.configs.schema import Recipe
from shardstep.configs.text import count
from shardstep.datasets.augment import build_transforms
from shardstep.datasets.batches import micro_pieces
from shardstep.datasets.framing import RANDOM_CROP
from shardstep.trainer.checkpoints.checkpoint import read_weights
from shardstep.trainer.data import Data
from shardstep.trainer.distributed import ddp
from shardstep.trainer.distributed.gradients import gradient_sync_problems, gradient_sync_warnings, graphs_problem
from shardstep.trainer.distributed.world import build_accelerator
from shardstep.trainer.formats.candidates import MEMORY_FORMATS
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, convert_convolutions
from shardstep.trainer.kernels.max_pool import convert_max_pools
from shardstep.trainer.models import TIMM, TORCHVISION, build_model
from shardstep.trainer.models.pretrained import fit_weights, read_weights_file
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.average import average_of
from shardstep.trainer.optim.losses import Objective, build_objective, check_labels, check_outputs, class_weights
from shardstep.trainer.optim.optimizers import build_optimizer
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.optim.pytorch_optimizers import PREFIX as PYTORCH_OPTIMIZER
from shardstep.trainer.optim.schedules import COMMON_OPTIONS, schedule_of
from shardstep.trainer.own_code import contracts
from shardstep.trainer.precision import halve
from shardstep.trainer.run_dir import find_weights
from shardstep.trainer.state import TrainState

_INITIALIZE_SAMPLES = 5000  # training images for data-dependent initialisation


def initial_model(
    recipe: Recipe, loaded: Data, device: torch.device, display: Display, resumed: bool = False
) -> nn.Module:
    """Build the model with its initial weights, the same on every rank, on the device.

    A resumed run loads no pretrained weights, because its checkpoint has weights.

    Raises:
        InputError: the model does not fit the images or the loss.
    """
    name = recipe.model["name"]
    torch.manual_seed(recipe.run.seed)
    if is_import_path(name):  # which may take its initial weights from anywhere
        random.seed(recipe.run.seed)
        np.random.seed(recipe.run.seed % 2**32)
    module = build_model(recipe.model, loaded.image_shape, loaded.num_classes)
    is_loaded_by_itself = is_import_path(name) and "pretrained" in options_of(load_function(name))
    if recipe.model["pretrained"] and not resumed and not is_loaded_by_itself:
        _load_pretrained(recipe.model, module, loaded, display)
    module = module.to(device)
    images, _ = loaded.first_samples(2, device)
    with torch.no_grad():
        module.eval()
        if is_import_path(name):
            contracts.check_model(name, module, images, loaded.num_classes)
        check_outputs(recipe.loss, module(images).float(), images)
        _check_shrunk(recipe, module, images)
        module.train()
    return module


def _load_pretrained(section: dict[str, Any], module: nn.Module, loaded: Data, display: Display) -> None:
    name, pretrained, num_classes = section["name"], section["pretrained"], loaded.num_classes
    if name.startswith(TORCHVISION):
        from shardstep.trainer.models.torchvision_models import downloaded_weights, misfit_cause, with_new_names

        tensors = downloaded_weights(name) if pretrained is True else with_new_names(_read_weights(str(pretrained)))
        cause = f". {misfit_cause(name, pretrained)}"
    elif name.startswith(TIMM) and pretrained is True:
        from shardstep.trainer.models.timm_models import pretrained_weights

        tensors, cause = pretrained_weights(name, loaded.image_shape), ""
    elif pretrained is True:
        raise InputError(f"model.pretrained=true: there are no weights of {name} to download; give a folder or a file")
    else:
        tensors, cause = _read_weights(str(pretrained)), ""
    try:
        fit = fit_weights(module, tensors, num_classes, f"model.pretrained={pretrained}")
    except InputError as error:
        raise InputError(f"{error}{cause}") from None
    head = f"; for {num_classes:,} classes, these are new: {', '.join(fit.head)}" if fit.head else ""
    display.note(f"pretrained weights in {count(fit.loaded, 'tensor')}{head}")
    if fit.misfits:
        display.warn(f"model.pretrained={pretrained}: {fit.misfits}{cause}")


def _read_weights(place: str) -> dict[str, Tensor]:
    path = Path(place)
    return read_weights(find_weights(path)[0]) if path.is_dir() else read_weights_file(path)


def check_contracts(
    recipe: Recipe, module: nn.Module, objective: Objective, loaded: Data, plan: Plan, device: torch.device
) -> None:
    """Check what the recipe names by import path on the first training samples, and optimizers of pytorch_optimizer.

    Raises:
        InputError: something breaks its contract, see own_code/contracts.py.
    """
    names = [recipe.optimizer["name"], *(group.get("name") for group in recipe.optimizer["groups"])]
    of_package = [name for name in names if str(name).startswith(PYTORCH_OPTIMIZER)]
    has_own = any(map(is_import_path, names))
    if has_own or of_package:
        try:
            contracts.check_optimizer(partial(build_optimizer, recipe.optimizer), module)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            if has_own or isinstance(error, InputError):
                raise
            raise InputError(f"optimizer.name={of_package[0]} cannot work here: {first_line(error)}") from None
    if not names_of_code(recipe):
        return
    may_be_empty = 0 in _micro_batch_sizes(recipe, plan)
    model, loss = recipe.model["name"], recipe.loss["name"]
    schedule, average = recipe.schedule["name"], recipe.average["name"]
    with torch.no_grad():
        images, labels = loaded.first_samples(contracts.PROBED_SAMPLES, device)
        module.eval()
        if is_import_path(model) and may_be_empty:
            contracts.check_empty_batch(model, module, images)
        if is_import_path(loss):
            contracts.check_loss(loss, objective.training_loss, module(images), labels)
        module.train()
    pixels, _ = loaded.first_pixels(contracts.PROBED_SAMPLES, device)
    sections = [entry for entry in recipe.data.augment if entry["name"] != RANDOM_CROP]
    for section in sections:
        if is_import_path(section["name"]):
            (transform,) = build_transforms([section])
            pixels = contracts.check_transform(section["name"], transform, pixels, may_be_empty)
    if is_import_path(schedule):
        options = {key: value for key, value in recipe.schedule.items() if key not in ("name", *COMMON_OPTIONS)}
        contracts.check_schedule(schedule, schedule_of(schedule), options, plan.samples_per_epoch)
    if is_import_path(average):
        options = {key: value for key, value in recipe.average.items() if key not in ("name", "every")}
        contracts.check_average(average, average_of(average), options)


def initialize(recipe: Recipe, module: nn.Module, loaded: Data, device: torch.device) -> float:
    """Set the weights that depend on the data, equally on all ranks; return the seconds it took."""
    began = time.perf_counter()
    set_weights = getattr(module, "initialize", None)
    if set_weights and not recipe.model["pretrained"]:
        images, _ = loaded.first_samples(_INITIALIZE_SAMPLES, device)
        set_weights(images)
        next(module.parameters()).sum().item()  # waits for the device
    return time.perf_counter() - began


def _check_shrunk(recipe: Recipe, module: nn.Module, images: Tensor) -> None:
    for size in [entry["size"] for entry in recipe.data.augment if entry["name"] == "shrink"]:
        try:
            module(nn.functional.interpolate(images, (size, size)))
        except RuntimeError:
            raise InputError(
                f"data.augment: shrink with size={size}: model.name={recipe.model['name']} cannot take images of "
                f"{size}x{size} beside larger ones"
            ) from None


def training_objective(recipe: Recipe, loaded: Data, device: torch.device) -> Objective:
    """Build the objective for these data, with the weights of their classes.

    Raises:
        InputError: the loss does not fit the labels, or loss.class_weights names no class.
    """
    several = loaded.train.manifest.has_several_labels
    objective = build_objective(recipe.loss, recipe.model, several)
    if objective.reconstructs:
        return objective
    for part in loaded.distinct:
        if part.shards.label_sets is not None:
            check_labels(recipe.loss["name"], part.shards.label_sets, str(part.shards.path))
    if several and recipe.eval.sure_above is not None and objective.finds_several:
        raise InputError("eval.sure_above is for one label an image, but these have several: set it to null")
    classes, having = loaded.train.manifest.classes, loaded.train.samples_per_class()
    weights = class_weights(
        recipe.loss["class_weights"], classes, having, loaded.train.samples, objective.finds_several
    )
    return objective if weights is None else replace(objective, class_weights=weights.to(device))


def build_state(recipe: ResolvedRecipe, module: nn.Module) -> tuple[Accelerator, TrainState]:
    """Build the Accelerator, and a state with a new optimizer, in the recipe's precision and memory format.

    Raises:
        InputError: the optimizer's options do not fit the model.
    """
    config = recipe.train
    if config.weights == "half":
        halve(module, config.precision)
    accelerator = build_accelerator("fp32" if config.weights == "half" else config.precision)
    module = module.to(memory_format=MEMORY_FORMATS[config.memory_format])
    if config.convolutions in CONVOLUTION_METHODS:
        convert_convolutions(module, config.convolutions)
    if accelerator.device.type == "cpu" and config.memory_format == "channels_last" and config.compile == "none":
        convert_max_pools(module)
    optimizer = build_optimizer(recipe.optimizer, module, accelerator.scaler is not None, config.precision)
    return accelerator, TrainState(module, module, ddp.wrap_optimizer(accelerator, optimizer), accelerator.scaler)


def wrap_model(
    accelerator: Accelerator,
    recipe: ResolvedRecipe,
    state: TrainState,
    objective: Objective,
    loaded: Data,
    plan: Plan,
    compiled_before: bool = False,
) -> None:
    """Wrap a state's model for training on all ranks; again whenever parameters have been frozen or unfrozen. All ranks.

    `compiled_before`: the model has been compiled with the same parameters frozen.

    Raises:
        InputError: the model cannot be compiled here.
    """
    device, layout = accelerator.device, MEMORY_FORMATS[recipe.train.memory_format]
    channels, height, width = loaded.image_shape
    shapes = {(2, height, width)}
    if recipe.train.compile != "none":
        sides = [(height, width), *((entry["size"],) * 2 for entry in recipe.data.augment if entry["name"] == "shrink")]
        counts = _micro_batch_sizes(recipe, plan) - {0}  # of all ranks: synchronised batch norm communicates
        shapes = {(count, *side) for count in counts for side in sides} or shapes
    batches = [  # in the loader's memory layout
        torch.zeros(count, *side, channels, device=device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        for count, *side in sorted(shapes)
    ]

    def loss_of(outputs: Tensor, images: Tensor) -> Tensor:
        return objective.loss(outputs, images, loaded.first_labels(len(images), device))

    config = recipe.train
    if graphs_problem(config, device.type, plan.world_size, plan.micro_steps):
        config = replace(config, compile="default")
    try:
        state.model = ddp.wrap_for_training(
            accelerator, state.module, config, loss_of, batches, before=state.model, compiled_before=compiled_before
        )
    except RuntimeError as error:
        if config.compile == "none" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"train.compile={config.compile} fails ({str(error).strip().splitlines()[0]}): use none; or, on a CPU, "
            f"install a C++ compiler (g++)"
        ) from None


def check_gradient_sync(recipe: ResolvedRecipe, world: PartialState, plan: Plan, resumed: bool) -> list[str]:
    """Check train.all_reduce, compress and compile in the world that came up; return warnings.

    Raises:
        InputError: they cannot work.
    """
    problems = gradient_sync_problems(recipe.train)
    compiled = recipe.train.compile != "none"
    if compiled and recipe.model.get("sync_batch_norm") and 0 in _micro_batch_sizes(recipe, plan):
        problems.append(
            f"train.compile={recipe.train.compile} with model.sync_batch_norm: some batches leave a rank without samples. It "
            f"runs uncompiled then, and its all-reduces do not match the others': use data.last_batch=drop or compile=none"
        )
    if problems:
        raise InputError("\n".join(problems))
    without_graphs = graphs_problem(recipe.train, world.device.type, world.num_processes, plan.micro_steps)
    warnings = gradient_sync_warnings(recipe.train, world.num_processes, resumed)
    if without_graphs:
        warnings.insert(0, f"train.compile={recipe.train.compile} runs without CUDA graphs: {without_graphs}")
    return warnings


def _micro_batch_sizes(recipe: Recipe, plan: Plan) -> set[int]:
    """Return all sizes of micro-batches on all ranks; 0 is among them where a rank may have no samples."""
    batches = {plan.global_batch_size, plan.samples_per_epoch % plan.global_batch_size} - {0}
    return {
        stop - start
        for size in batches
        for rank in range(plan.world_size)
        for start, stop in micro_pieces(size, rank, plan.world_size, recipe.train.max_micro_batch)
    }
