"""The model of a run: built, initialized, in its compute format, with its optimizer, wrapped for all ranks."""

import time
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import ResolvedRecipe
from shardstep.configs.schema import Recipe
from shardstep.datasets.batches import micro_pieces
from shardstep.trainer.data import Data
from shardstep.trainer.distributed import ddp
from shardstep.trainer.distributed.gradients import graphs_problem, sharing_problems, sharing_warnings
from shardstep.trainer.distributed.world import build_accelerator
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, convert_convolutions
from shardstep.trainer.kernels.max_pool import convert_max_pools
from shardstep.trainer.models import build_model
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.losses import Objective, check_outputs
from shardstep.trainer.optim.optimizers import build_optimizer
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.precision import MEMORY_FORMATS, halve
from shardstep.trainer.state import TrainState

_INITIALIZE_SAMPLES = 5000  # training images that data-dependent initialisation looks at


def initial_model(
    recipe: Recipe, loaded: Data, device: torch.device, display: Display, resumed: bool = False
) -> nn.Module:
    """The model with its first weights, the same on every rank, on the device.

    A resumed run loads no pretrained weights: it has its own.

    Raises:
        InputError: the model does not fit the images or the loss.
    """
    torch.manual_seed(recipe.run.seed)
    module = build_model(recipe.model, loaded.image_shape, loaded.num_classes)
    if recipe.model.get("pretrained") and not resumed:
        from shardstep.trainer.models.torchvision_models import load_pretrained

        fresh = load_pretrained(recipe.model["name"], module, recipe.model["pretrained"])
        display.note(f"pretrained weights are loaded; {', '.join(fresh) or 'nothing'} begins anew")
    module = module.to(device)
    images, _ = loaded.first_samples(2, device)
    with torch.no_grad():
        module.eval()
        check_outputs(recipe.loss, module(images).float(), images)
        _check_shrunk(recipe, module, images)
        module.train()
    return module


def initialize(module: nn.Module, loaded: Data, device: torch.device) -> float:
    """Set the weights that depend on the data, and on nothing that differs between ranks; returns the seconds it took."""
    began = time.perf_counter()
    set_weights = getattr(module, "initialize", None)
    if set_weights:
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


def build_state(recipe: ResolvedRecipe, module: nn.Module) -> tuple[Accelerator, TrainState]:
    """Accelerate's view of the world, and a state with a new optimizer, in the recipe's precision and memory format.

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
    rehearsed: bool = False,
) -> None:
    """Let the ranks share the gradients of a state's model; again when parameters have been frozen or set free. All ranks.

    Args:
        accelerator: the world.
        recipe: with its choices made.
        state: between two steps; its `model` is wrapped anew around its `module`.
        objective: whose gradient it is.
        loaded: the data, for the shape of its images.
        plan: for the sizes of batches.
        rehearsed: the same parameters have been frozen before.

    Raises:
        InputError: the model cannot be compiled here.
    """
    device, layout = accelerator.device, MEMORY_FORMATS[recipe.train.memory_format]
    channels, height, width = loaded.image_shape
    shapes = {(2, height, width)}
    if recipe.train.compile != "none":
        sides = [(height, width), *((entry["size"],) * 2 for entry in recipe.data.augment if entry["name"] == "shrink")]
        counts = _micro_batch_sizes(recipe, plan) - {0}  # of all ranks: batch norm may have them talk in each pass
        shapes = {(count, *side) for count in counts for side in sides} or shapes
    batches = [  # laid out as those of the loader are
        torch.zeros(count, *side, channels, device=device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        for count, *side in sorted(shapes)
    ]

    def loss_of(outputs: Tensor, images: Tensor) -> Tensor:
        return objective.loss(outputs, images, torch.zeros(len(images), dtype=torch.long, device=device))

    config = recipe.train
    if graphs_problem(config, device.type, plan.world_size, plan.micro_steps):
        config = replace(config, compile="default")
    try:
        state.model = ddp.wrap_for_training(
            accelerator, state.module, config, loss_of, batches, before=state.model, rehearsed=rehearsed
        )
    except RuntimeError as error:
        if config.compile == "none" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"train.compile={config.compile} fails ({str(error).strip().splitlines()[0]}): use none; or, on a CPU, see "
            f"that there is a C++ compiler (g++)"
        ) from None


def check_sharing(recipe: ResolvedRecipe, world: PartialState, plan: Plan, resumed: bool) -> list[str]:
    """What to warn of in the way that ranks share gradients, once the precision is settled.

    Raises:
        InputError: it cannot work.
    """
    problems = sharing_problems(recipe.train)
    compiled = recipe.train.compile != "none"
    if compiled and recipe.model.get("sync_batch_norm") and 0 in _micro_batch_sizes(recipe, plan):
        problems.append(
            f"train.compile={recipe.train.compile} with model.sync_batch_norm: some batches leave a rank without samples, "
            f"and what it does without the compiler would not meet the others: use data.last_batch=drop or compile=none"
        )
    if problems:
        raise InputError("\n".join(problems))
    without_graphs = graphs_problem(recipe.train, world.device.type, world.num_processes, plan.micro_steps)
    warnings = (
        [f"train.compile={recipe.train.compile} goes without CUDA graphs: {without_graphs}"] if without_graphs else []
    )
    return [*warnings, *sharing_warnings(recipe.train, world.num_processes, resumed)]


def _micro_batch_sizes(recipe: Recipe, plan: Plan) -> set[int]:
    """How many samples a pass of some rank may have; 0 among them where a rank may be left without."""
    batches = {plan.global_batch_size, plan.samples_per_epoch % plan.global_batch_size} - {0}
    return {
        stop - start
        for size in batches
        for rank in range(plan.world_size)
        for start, stop in micro_pieces(size, rank, plan.world_size, recipe.train.max_micro_batch)
    }
