"""A checked recipe and a world to a Run: everything that the loop uses, built in one place."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe, save_recipe
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.datasets.augment import build_transforms
from shardstep.datasets.batches import OrderConfig, TrainBatches, test_batches
from shardstep.trainer import checkpoint, data, runtime
from shardstep.trainer.check import check_recipe
from shardstep.trainer.checkpoint import TrainState
from shardstep.trainer.clip import Clip
from shardstep.trainer.data import Data
from shardstep.trainer.display import Display
from shardstep.trainer.evaluate import Evaluation, TestBatches, evaluate
from shardstep.trainer.losses import Loss, check_outputs, evaluation_loss, training_loss
from shardstep.trainer.metrics import Metrics, cut_lines
from shardstep.trainer.models import build_model
from shardstep.trainer.optimizers import build_optimizer
from shardstep.trainer.plan import Plan, make_plan
from shardstep.trainer.precision import MEMORY_FORMATS, Compute, check_precision, choose_compute
from shardstep.trainer.sample_log import SampleLog
from shardstep.trainer.schedules import LearningRate
from shardstep.trainer.tracking import WandbTracker

T = TypeVar("T")
SETTLED = (("data", "mode"), ("train", "precision"), ("train", "memory_format"))
_INITIALIZE_SAMPLES = 5000  # training images that data-dependent initialisation looks at


@dataclass(frozen=True)
class Every:
    """How often occasional work is done."""

    log: Duration
    evaluation: Duration
    checkpoint: Duration


@dataclass
class Run:
    """One training run, ready to go."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    state: TrainState
    plan: Plan
    data: Data
    batches: TrainBatches
    loss: Loss
    learning_rate: LearningRate
    base_lr: float
    clip: Clip
    every: Every
    metrics: Metrics
    display: Display
    tracker: WandbTracker | None
    sample_log: SampleLog | None

    def evaluate(self) -> Evaluation:
        """Evaluate the model as it is now on the test set; all ranks together."""
        return evaluate(
            self.accelerator,
            self.state.module,
            self.test_batches,
            evaluation_loss(self.recipe.loss),
            self.data.test.manifest.samples,
            self.data.num_classes,
        )

    @property
    def test_batches(self) -> TestBatches:
        return make_test_batches(self.recipe, self.accelerator, self.data)

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def keep_checkpoints(self) -> int:
        return self.recipe.checkpoint.keep


def build(world: PartialState, recipe: Recipe, display: Display) -> Run:
    """Build a run. Every rank calls it; a problem of any rank is raised on all.

    Choices of `auto` are settled here and written into the recipe, and with it to config.yaml.

    Raises:
        InputError: the data, the model and the number of ranks do not fit together, or the run's folder is taken.
    """
    folder = Path(recipe.run.dir)
    resume_from = together(world, lambda: _claim_folder(world, recipe, folder, display))
    train, test = together(world, lambda: data.open_both(recipe.data))
    plan = together(
        world,
        lambda: make_plan(recipe.train, train.manifest.samples, recipe.data.last_batch == "drop", world.num_processes),
    )
    recipe.train.device = world.device.type
    recipe.data.mode = runtime.broadcast_object(world, data.choose_mode(recipe.data, train, test, world.device))
    loaded = together(world, lambda: data.load(recipe, train, test, world.device))
    module = together(world, lambda: initial_model(recipe, loaded, world.device))
    seconds = _settle_compute(world, recipe, module, loaded, plan, display)

    accelerator, state = together(world, lambda: prepare(recipe, module))
    if resume_from:
        together(world, lambda: checkpoint.load(state, resume_from))
    if accelerator.is_main_process:
        save_recipe(recipe, folder / "config.yaml")
        for lines in folder.glob("*.jsonl"):
            cut_lines(lines, state.progress.step)
    accelerator.wait_for_everyone()

    listeners: list[Callable[[dict[str, Any]], None]] = [lambda line: display.line(line, plan.total_steps)]
    tracker = None
    if recipe.log.wandb != "disabled" and accelerator.is_main_process:
        tracker = WandbTracker(recipe, folder, display.warn)
        listeners.append(tracker.log)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        state=state,
        plan=plan,
        data=loaded,
        batches=_train_batches(recipe, accelerator, loaded, plan),
        loss=training_loss(recipe.loss),
        learning_rate=LearningRate(recipe.schedule, plan.duration, plan.samples_per_epoch, plan.global_batch_size),
        base_lr=float(recipe.optimizer["lr"]),
        clip=Clip(recipe.train.clip_norm, recipe.train.clip_value),
        every=Every(*(Duration.parse(text) for text in (recipe.log.every, recipe.eval.every, recipe.checkpoint.every))),
        metrics=Metrics(accelerator, folder / "metrics.jsonl", listeners),
        display=display,
        tracker=tracker,
        sample_log=SampleLog(folder, accelerator.process_index, train) if recipe.log.sample_keys else None,
    )
    _describe(run, seconds)
    return run


def together(world: PartialState, action: Callable[[], T]) -> T:
    """Do something that can fail on any rank; if it does on one, all ranks raise.

    Raises:
        InputError: the problems of all ranks.
    """
    problem, result = None, None
    try:
        result = action()
    except InputError as error:
        problem = error
    runtime.raise_together(world, problem)
    return result  # type: ignore[return-value] # None only where `action` returns it, or something was raised


def initial_model(recipe: Recipe, loaded: Data, device: torch.device) -> nn.Module:
    """The model with its first weights, the same on every rank, on the device.

    Raises:
        InputError: the model does not fit the images or the loss.
    """
    torch.manual_seed(recipe.run.seed)
    module = build_model(recipe.model, loaded.image_shape, loaded.num_classes).to(device)
    images = loaded.normalize(loaded.train_reader.read(np.arange(2))[0].to(device))
    with torch.no_grad():
        module.eval()
        check_outputs(recipe.loss, module(images).float())
        module.train()
    initialize = getattr(module, "initialize", None)
    if initialize:  # depends on the data, and on nothing that differs between ranks
        first = np.arange(min(_INITIALIZE_SAMPLES, loaded.train.manifest.samples))
        initialize(loaded.normalize(loaded.train_reader.read(first)[0].to(device)))
    return module


def prepare(recipe: Recipe, module: nn.Module) -> tuple[Accelerator, TrainState]:
    """Wrap a model and a new optimizer for it in Accelerate's, in the recipe's precision and memory format.

    Raises:
        InputError: the optimizer's options do not fit the model.
    """
    accelerator = runtime.build_accelerator(recipe.train.precision)
    module = module.to(memory_format=MEMORY_FORMATS[recipe.train.memory_format])
    optimizer = build_optimizer(recipe.optimizer, module)
    model, prepared = runtime.wrap(accelerator, module, optimizer)
    return accelerator, TrainState(module, model, prepared, accelerator.scaler)


def make_test_batches(recipe: Recipe, accelerator: Accelerator, loaded: Data) -> TestBatches:
    """A function that makes a pass over this rank's part of the test set."""
    return lambda: test_batches(
        loaded.test_reader,
        loaded.test.manifest.samples,
        batch_size=recipe.eval.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        normalize=loaded.normalize,
        memory_format=MEMORY_FORMATS[recipe.train.memory_format],
        device=accelerator.device,
        workers=recipe.data.workers if recipe.data.mode == "stream" else 0,
    )


def _train_batches(recipe: Recipe, accelerator: Accelerator, loaded: Data, plan: Plan) -> TrainBatches:
    return TrainBatches(
        loaded.train_reader,
        OrderConfig(
            loaded.train.samples_per_shard,
            recipe.run.seed,
            recipe.data.lanes,
            data.window_shards(recipe.data, loaded.train.manifest),
        ),
        global_batch_size=plan.global_batch_size,
        samples_per_epoch=plan.samples_per_epoch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_micro_batch=recipe.train.max_micro_batch,
        transforms=build_transforms(recipe.data.augment),
        normalize=loaded.normalize,
        memory_format=MEMORY_FORMATS[recipe.train.memory_format],
        device=accelerator.device,
        workers=recipe.data.workers if recipe.data.mode == "stream" else 0,
    )


def _settle_compute(
    world: PartialState, recipe: Recipe, module: nn.Module, loaded: Data, plan: Plan, display: Display
) -> dict[Compute, float]:
    """Choose precision and memory format on rank 0 for all, into the recipe; returns the measured seconds per step."""
    chosen, seconds = None, {}
    if world.is_main_process:
        size = min(
            plan.global_batch_size // plan.world_size, recipe.train.max_micro_batch, loaded.train.manifest.samples
        )
        images, labels = loaded.train_reader.read(np.arange(size))
        chosen, seconds = choose_compute(
            recipe.train.precision,
            recipe.train.memory_format,
            module,
            training_loss(recipe.loss),
            (loaded.normalize(images.to(world.device)), labels.to(world.device)),
        )
    chosen = runtime.broadcast_object(world, chosen)
    warning = together(world, lambda: check_precision(chosen.precision, world.device))
    if warning:
        display.warn(warning)
    recipe.train.precision, recipe.train.memory_format = chosen.precision, chosen.memory_format
    return seconds


def _claim_folder(world: PartialState, recipe: Recipe, folder: Path, display: Display) -> Path | None:
    """Make the run's folder, or find the checkpoint in it to resume from. Rank 0 looks, all get the answer."""
    answer: Path | str | None = None
    if world.is_main_process:
        try:
            answer = _find_resume(recipe, folder, display)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            answer = f"run.dir={folder} cannot be used: {error}"
        except InputError as error:
            answer = str(error)
    answer = runtime.broadcast_object(world, answer)
    if isinstance(answer, str):
        raise InputError(answer)
    return answer


def _find_resume(recipe: Recipe, folder: Path, display: Display) -> Path | None:
    config_path, found = folder / "config.yaml", checkpoint.list_checkpoints(folder / "checkpoints")
    if recipe.run.resume == "must" and not found:
        raise InputError(f"run.resume=must, but there is no checkpoint in {folder / 'checkpoints'}")
    if folder.exists() and (recipe.run.resume == "never" or not found) and any(folder.iterdir()):
        # What is there is kept: a new run never overwrites an old one.
        aside = next(path for number in itertools.count(1) if not (path := Path(f"{folder}.old{number}")).exists())
        folder.rename(aside)
        display.note(f"the run that was in {folder} is now in {aside}")
        return None
    if not found:
        return None
    saved = check_recipe(load_recipe(str(config_path)))
    differences = _differences(saved, recipe)
    if differences:
        raise InputError.from_problems(
            f"{folder} holds a run with another recipe, which this one cannot continue (give another run.dir, or "
            f"run.resume=never to begin again; the old run is then kept beside it)",
            differences,
        )
    for section, key in SETTLED:  # choices of `auto` are made once
        setattr(getattr(recipe, section), key, getattr(getattr(saved, section), key))
    display.note(f"resuming from {found[-1]}")
    return found[-1]


def _differences(saved: Recipe, given: Recipe) -> list[str]:
    """Keys that change the mathematics of a run and differ, as "key: was -> is"."""
    compared = {
        "run": ["seed"],
        "data": ["augment", "normalize", "resize", "lanes", "window_shards", "last_batch"],
        "train": ["global_batch_size", "precision", "memory_format", "clip_norm", "clip_value", "duration"],
    }
    pairs = [
        (f"{section}.{key}", getattr(getattr(saved, section), key), getattr(getattr(given, section), key))
        for section, keys in compared.items()
        for key in keys
    ]
    for section in OPEN_SECTIONS:
        before, after = getattr(saved, section), getattr(given, section)
        pairs += [(f"{section}.{key}", before.get(key), after.get(key)) for key in {**before, **after}]
    return [f"{key}: {was} -> {now}" for key, was, now in pairs if was != now and now != "auto"]


def _describe(run: Run, seconds: dict[Compute, float]) -> None:
    """Say once what will happen, with the formulas behind derived numbers."""
    recipe, plan, note = run.recipe, run.plan, run.display.note
    manifest, device = run.data.train.manifest, run.accelerator.device
    ranks, threads = plan.world_size, torch.get_num_threads()
    height, width, channels = run.data.train_reader.image_shape
    window = data.window_shards(recipe.data, manifest) or "all"
    parameters = list(run.state.module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    processor = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {threads} thread{'s' * (threads > 1)} a rank"
    )
    largest = -(-plan.global_batch_size // ranks)
    measured = ", ".join(
        f"{compute.precision} {compute.memory_format} {1000 * value:.0f} ms" for compute, value in seconds.items()
    )
    steps = (
        f"{plan.total_steps} steps"
        if plan.duration.unit == "steps"
        else f"{plan.duration} = {plan.total_steps} steps of ceil({plan.samples_per_epoch:,} / {plan.global_batch_size}) = "
        f"{plan.steps_per_epoch} per epoch"
    )
    note(f"shardstep {metadata.version('shardstep')} on torch {torch.__version__}: {recipe.run.name}, in {run.folder}")
    note(f"  world      {ranks} rank{'s' * (ranks > 1)}, {processor}")
    note(
        f"  data       {manifest.samples:,} + {run.data.test.manifest.samples:,} images {width}x{height}x{channels}, "
        f"{run.data.num_classes} classes, {recipe.data.mode}; order: lanes {recipe.data.lanes}, window {window}"
    )
    note(f"  model      {recipe.model['name']}, {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained")
    note(f"  optimizer  {recipe.optimizer['name']}, rate {run.base_lr:g}, {recipe.schedule['name']}")
    note(
        f"  precision  {recipe.train.precision}, {recipe.train.memory_format}{f' (measured: {measured})' if measured else ''}"
    )
    note(
        f"  batch      {plan.global_batch_size} = {ranks} rank{'s' * (ranks > 1)} x {plan.micro_steps} micro-step"
        f"{'s' * (plan.micro_steps > 1)} of at most {min(largest, recipe.train.max_micro_batch)}"
    )
    note(f"  duration   {steps}")
