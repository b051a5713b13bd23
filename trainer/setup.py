"""Build a Run from a validated recipe and a world: data, choices of `auto`, model, and the state to resume from."""

from functools import partial
from pathlib import Path

from accelerate import PartialState

from shardstep.configs.resolve import Choices, resolve, with_keys
from shardstep.configs.schema import Recipe
from shardstep.trainer import data, model_setup, resume
from shardstep.trainer.distributed.collectives import broadcast_object, raise_on_all_ranks
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.optim.average import Average
from shardstep.trainer.optim.plan import make_plan
from shardstep.trainer.own_code.kept_code import check_same_code
from shardstep.trainer.precision import resolve_precision
from shardstep.trainer.run import Run, assemble
from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.stopping.stop_requests import StopSignal


def build(
    world: PartialState,
    recipe: Recipe,
    display: Display,
    stop_signal: StopSignal | None = None,
    measure_anew: bool = False,
) -> Run:
    """Build a run. All ranks call it; a problem of any rank is raised on all.

    Args:
        recipe: validated; this function makes every choice that it leaves to `auto`, and writes them to config.yaml.
        stop_signal: of this process; None where it listens to no signals.
        measure_anew: whether to measure choices of `auto` even if an earlier start has kept the answer.

    Raises:
        InputError: the data, the model and the number of ranks do not fit together, or the run's folder is taken.
    """
    check_same_code(world, recipe)
    recipe = resume.with_choices_of_rank_0(world, recipe)
    run_dir = RunDir(Path(recipe.run.dir))
    with raise_on_all_ranks(world):
        found = resume.lock_and_find(run_dir, recipe, display.warn) if world.is_main_process else resume.Resume()
    found = broadcast_object(world, found)
    is_resumed = found.path is not None

    with raise_on_all_ranks(world):
        parts = data.open_parts(recipe.data)
        plan = make_plan(recipe.train, parts.train.samples, recipe.data.last_batch == "drop", world.num_processes)
    mode = broadcast_object(world, data.choose_mode(recipe.data, parts, world.device))
    crop_version = broadcast_object(world, data.choose_crop_version(recipe.data, parts))
    recipe = with_keys(recipe, data={"crop_version": crop_version})
    with raise_on_all_ranks(world):
        loaded = data.load(recipe.data, mode, parts, world.device)

    with raise_on_all_ranks(world):
        module = model_setup.initial_model(recipe, loaded, world.device, display, is_resumed)
        initialized_s = model_setup.initialize(recipe, module, loaded, world.device)
    with raise_on_all_ranks(world):
        objective = model_setup.training_objective(recipe, loaded, world.device)
        model_setup.check_contracts(recipe, module, objective, loaded, plan, world.device)
    compute, measured = resolve_precision(world, recipe, module, objective, loaded, plan, display, measure_anew)
    order_version = data.choose_order_version(recipe.data)
    choices = (compute.precision, compute.memory_format, compute.convolutions, order_version, crop_version)
    resolved = resolve(recipe, Choices(mode, world.device.type, *choices))

    with raise_on_all_ranks(world):
        accelerator, state = model_setup.build_state(resolved, module)
        warnings = model_setup.check_gradient_sync(resolved, world, plan, is_resumed)
    for warning in warnings:
        display.warn(warning)
    wrap = partial(model_setup.wrap_model, accelerator, resolved, state, objective, loaded, plan)
    wrap()
    average = Average(resolved.average, plan)
    average.begin(state)
    resume.restore(world, state, found, resolved, loaded, plan, display)
    resume.claim(world, run_dir, not is_resumed, resolved, loaded.train.manifest, state, display)
    return assemble(
        accelerator, resolved, run_dir, state, plan, loaded, objective, average, wrap,
        display, stop_signal or StopSignal(), initialized_s, measured,
    )  # fmt: skip
