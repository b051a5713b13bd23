"""A checked recipe and a world to a Run: everything that the loop uses, built in one place."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from shardstep.configs.durations import Duration
from shardstep.configs.errors import InputError
from shardstep.configs.files import write_whole
from shardstep.configs.load import save_recipe
from shardstep.configs.schema import Recipe
from shardstep.datasets.augment import Normalize, build_transforms
from shardstep.datasets.batches import GlobalBatch, OrderConfig, TrainBatches, micro_pieces, test_batches
from shardstep.datasets.manifest import manifest_bytes
from shardstep.datasets.order import window_of
from shardstep.datasets.reader import Reader
from shardstep.trainer import checkpoint, checkpoint_files, data, launcher, machine, runtime
from shardstep.trainer.average import Average, averaged
from shardstep.trainer.checkpoint import TrainState
from shardstep.trainer.clip import Clip
from shardstep.trainer.convolutions import CONVOLUTION_METHODS, convert_convolutions
from shardstep.trainer.data import Data
from shardstep.trainer.display import Display
from shardstep.trainer.evaluate import Evaluation, TestBatches, evaluate
from shardstep.trainer.folder import CONFIG_NAME, MANIFEST_NAME, SETTLED, Resume, begin, find_resume, is_run
from shardstep.trainer.freeze import Freezer
from shardstep.trainer.lock import hold
from shardstep.trainer.losses import Objective, build_objective, check_outputs
from shardstep.trainer.max_pool import convert_max_pools
from shardstep.trainer.metrics import Metrics, cut_lines
from shardstep.trainer.models import build_model
from shardstep.trainer.optimizers import build_optimizer
from shardstep.trainer.origin import facts_of
from shardstep.trainer.plan import Plan, make_plan
from shardstep.trainer.precision import (
    MEMORY_FORMATS,
    PROBE_SAMPLES,
    Compute,
    candidates,
    check_precision,
    halve,
    measure,
)
from shardstep.trainer.preempt import Requests, StopRequest
from shardstep.trainer.profiler import Profiler, parse_steps
from shardstep.trainer.sample_log import SampleLog
from shardstep.trainer.saver import Saver
from shardstep.trainer.schedules import LearningRate
from shardstep.trainer.sharing import graphs_problem, sharing_problems, sharing_warnings
from shardstep.trainer.skip import BadSteps
from shardstep.trainer.time_limit import TimeLimit
from shardstep.trainer.timing import Timer
from shardstep.trainer.tracking import Trackers, start_trackers
from shardstep.trainer.watchdog import Watchdog

T = TypeVar("T")
_INITIALIZE_SAMPLES = 5000  # training images that data-dependent initialisation looks at
# For the end of the attempt before: a network file system keeps the locks of a crashed node for a lease, often 90 s.
_RESTART_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Every:
    """How often occasional work is done."""

    log: Duration
    evaluation: Duration
    checkpoint: Duration


@dataclass
class Run:
    """One training run, ready to go.

    `initialized_s`: seconds that data-dependent initialisation took; `probed_s`: seconds per step of each precision and
    layout that were tried.
    """

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    state: TrainState
    plan: Plan
    data: Data
    batches: TrainBatches
    test_batches: TestBatches
    objective: Objective
    learning_rate: LearningRate
    base_lr: float
    clip: Clip
    average: Average
    freezer: Freezer
    every: Every
    metrics: Metrics
    display: Display
    trackers: Trackers
    bad_steps: BadSteps
    requests: Requests
    saver: Saver
    time_limit: TimeLimit
    watchdog: Watchdog
    sample_log: SampleLog | None
    timer: Timer
    profiler: Profiler
    initialized_s: float
    probed_s: dict[Compute, float]

    def evaluate(self) -> Evaluation | None:
        """Evaluate the model as it is now on the test set; None if all are to stop. All ranks together."""
        self.requests.restart()

        def stop_requested() -> bool:
            self.watchdog.beat(self.state.progress.step, "evaluating")
            return self.requests.check()

        with averaged(self.state):
            evaluation = evaluate(
                self.accelerator,
                self.state.module,
                self.test_batches,
                self.objective,
                self.data.test.manifest.samples,
                self.data.num_classes,
                self.recipe.eval,
                stop_requested,
            )
        self.requests.restart()
        return evaluation

    def begin_step(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """The same batch, watched by those who want to know what becomes of it."""
        batch = self.watchdog.watch(batch, step)
        if self.sample_log:
            batch = self.sample_log.watch(batch, step)  # each rank writes its own file
        self.profiler.begin_step(step)
        self.timer.begin_step()
        return batch

    @property
    def seed(self) -> int:
        return self.recipe.run.seed


def build(world: PartialState, recipe: Recipe, display: Display, request: StopRequest | None = None) -> Run:
    """Build a run. Every rank calls it; a problem of any rank is raised on all.

    Choices of `auto` are settled here and written into the recipe, and with it to config.yaml.

    Args:
        world: that came up.
        recipe: checked.
        display: for notes and warnings.
        request: what signals have told this process; None where none are listened to.

    Raises:
        InputError: the data, the model and the number of ranks do not fit together, or the run's folder is taken.
    """
    folder = Path(recipe.run.dir)
    request = request or StopRequest()
    _follow_rank_0(world, recipe)
    resume = together(world, lambda: _look_into_folder(recipe, display) if world.is_main_process else Resume())
    resume = runtime.broadcast_object(world, resume)
    train, test = together(world, lambda: data.open_both(recipe.data))
    plan = together(
        world,
        lambda: make_plan(recipe.train, train.manifest.samples, recipe.data.last_batch == "drop", world.num_processes),
    )
    recipe.train.device = world.device.type
    recipe.data.mode = runtime.broadcast_object(world, data.choose_mode(recipe.data, train, test, world.device))
    loaded = together(world, lambda: data.load(recipe, train, test, world.device))
    module = together(world, lambda: initial_model(recipe, loaded, world.device, display, resume.path is not None))
    initialized_s = together(world, lambda: initialize(module, loaded, world.device))
    objective = build_objective(recipe.loss, recipe.model)
    probed_s = _settle_compute(world, recipe, module, objective, loaded, plan, display)

    accelerator, state = together(world, lambda: prepare(recipe, module))
    for warning in together(world, lambda: _check_sharing(recipe, world, plan, resume.path is not None)):
        display.warn(warning)
    wrap = partial(wrap_model, accelerator, recipe, state, objective, loaded, plan)
    wrap()
    average = Average(recipe.average, plan)
    average.begin(state)
    state.fingerprint, state.test_fingerprint = train.manifest.fingerprint, test.manifest.fingerprint
    for problem in resume.passed_over:
        display.warn(f"passed over, because it is not whole: {problem}")
    if resume.path:
        path, rank, ranks = resume.path, world.process_index, world.num_processes
        new_test_set: Literal["allow", "refuse"] = "allow" if "data.test" in recipe.run.allow_changes else "refuse"
        together(world, lambda: checkpoint.load(state, path, rank, ranks, new_test_set))
        if state.progress.position >= plan.samples_per_epoch:  # of an epoch that another batch size makes shorter
            state.progress = replace(state.progress, epoch=state.progress.epoch + 1, position=0)
        display.note(f"resuming from {path}")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    state.starts.append({"step": state.progress.step, "world_size": world.num_processes, "time": now})
    _claim_folder(accelerator, resume.path is None, recipe, loaded, state, display)

    listeners: list[Callable[[dict[str, Any]], None]] = [display.line]
    trackers = Trackers([], display.warn, display.note, request.has_come)
    if accelerator.is_main_process:
        trackers = start_trackers(
            recipe,
            folder,
            state,
            lambda: facts_of(accelerator.device, world.num_processes),
            display.warn,
            display.note,
            request.has_come,
        )
        listeners.append(trackers.log)
    clip = Clip(recipe.train.clip_norm, recipe.train.clip_value, measures=recipe.log.grad_norm)
    saver = Saver(
        folder / "checkpoints", recipe.checkpoint.keep, display.warn, state.best, [display.saved, trackers.saved]
    )
    time_limit = TimeLimit(
        launcher.allocation(),
        lambda: saver.longest_s,
        share_done=lambda: plan.share_done(state.progress, state.train_s),
    )

    every = Every(*(Duration.parse(text) for text in (recipe.log.every, recipe.eval.every, recipe.checkpoint.every)))

    def tell_outlook(line: dict[str, Any]) -> None:
        outlook = time_limit.early_outlook()
        if outlook:
            display.note(outlook)

    listeners.append(tell_outlook)
    freezer = Freezer(state.optimizer.param_groups, plan, wrap)
    if recipe.train.compile != "none":
        freezer.rehearse()
    runtime.wait_for(world.device)  # or the first step would be charged for passes that are thrown away
    return Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        state=state,
        plan=plan,
        data=loaded,
        batches=_train_batches(recipe, accelerator, loaded, plan),
        test_batches=make_test_batches(
            recipe, accelerator, loaded.test_reader, test.manifest.samples, loaded.normalize, _reader_threads(recipe)
        ),
        objective=objective,
        learning_rate=LearningRate(recipe.schedule, plan.duration, plan.samples_per_epoch, plan.global_batch_size),
        base_lr=float(recipe.optimizer["lr"]),
        clip=clip,
        average=average,
        freezer=freezer,
        every=every,
        metrics=Metrics(
            accelerator,
            folder / "metrics.jsonl",
            state,
            plan,
            every.evaluation,
            listeners,
            display.warn,
            not objective.reconstructs,
            clip,
        ),
        display=display,
        trackers=trackers,
        bad_steps=BadSteps(recipe.train),
        requests=Requests(request, folder, world.is_main_process, runtime.agree(world), time_limit, plan.max_train_s),
        saver=saver,
        time_limit=time_limit,
        watchdog=Watchdog(runtime.Board(world), folder, recipe.run.hang_timeout, request, display.tell),
        sample_log=SampleLog(folder, accelerator.process_index, train) if recipe.log.sample_keys else None,
        timer=Timer(accelerator.device.type),
        profiler=Profiler(
            parse_steps(recipe.train.profile),
            folder / "profile",
            accelerator.process_index,
            world.device.type == "cuda",
            display.note,
        ),
        initialized_s=initialized_s,
        probed_s=probed_s,
    )


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
    images = loaded.normalize(loaded.train_reader.read(np.arange(min(2, loaded.train.manifest.samples)))[0].to(device))
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
        first = np.arange(min(_INITIALIZE_SAMPLES, loaded.train.manifest.samples))
        set_weights(loaded.normalize(loaded.train_reader.read(first)[0].to(device)))
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


def prepare(recipe: Recipe, module: nn.Module) -> tuple[Accelerator, TrainState]:
    """Accelerate's view of the world, and a state with a new optimizer, in the recipe's precision and memory format.

    Raises:
        InputError: the optimizer's options do not fit the model.
    """
    config = recipe.train
    if config.weights == "half":
        halve(module, config.precision)
    accelerator = runtime.build_accelerator("fp32" if config.weights == "half" else config.precision)
    module = module.to(memory_format=MEMORY_FORMATS[config.memory_format])
    if config.convolutions in CONVOLUTION_METHODS:
        convert_convolutions(module, config.convolutions)
    if accelerator.device.type == "cpu" and config.memory_format == "channels_last" and config.compile == "none":
        convert_max_pools(module)
    optimizer = build_optimizer(recipe.optimizer, module, accelerator.scaler is not None, config.precision)
    return accelerator, TrainState(module, module, runtime.wrap_optimizer(accelerator, optimizer), accelerator.scaler)


def wrap_model(
    accelerator: Accelerator,
    recipe: Recipe,
    state: TrainState,
    objective: Objective,
    loaded: Data,
    plan: Plan,
    rehearsed: bool = False,
) -> None:
    """Let the ranks share the gradients of a state's model; again when parameters have been frozen or set free. All ranks.

    Args:
        accelerator: the world.
        recipe: checked and settled.
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
        state.model = runtime.wrap_model(
            accelerator, state.module, config, loss_of, batches, before=state.model, rehearsed=rehearsed
        )
    except RuntimeError as error:
        if config.compile == "none" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"train.compile={config.compile} fails ({str(error).strip().splitlines()[0]}): use none; or, on a CPU, see "
            f"that there is a C++ compiler (g++)"
        ) from None


def _micro_batch_sizes(recipe: Recipe, plan: Plan) -> set[int]:
    """How many samples a pass of some rank may have; 0 among them where a rank may be left without."""
    batches = {plan.global_batch_size, plan.samples_per_epoch % plan.global_batch_size} - {0}
    return {
        stop - start
        for size in batches
        for rank in range(plan.world_size)
        for start, stop in micro_pieces(size, rank, plan.world_size, recipe.train.max_micro_batch)
    }


def _check_sharing(recipe: Recipe, world: PartialState, plan: Plan, resumed: bool) -> list[str]:
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


def make_test_batches(
    recipe: Recipe, accelerator: Accelerator, reader: Reader, num_samples: int, normalize: Normalize, workers: int
) -> TestBatches:
    """A function that makes a pass over this rank's part of a test set."""
    return lambda: test_batches(
        reader,
        num_samples,
        batch_size=recipe.eval.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        normalize=normalize,
        memory_format=MEMORY_FORMATS[recipe.train.memory_format],
        device=accelerator.device,
        workers=workers,
    )


def _reader_threads(recipe: Recipe) -> int:
    return recipe.data.workers if recipe.data.mode == "stream" else 0


def _train_batches(recipe: Recipe, accelerator: Accelerator, loaded: Data, plan: Plan) -> TrainBatches:
    train = loaded.train.manifest
    return TrainBatches(
        loaded.train_reader,
        OrderConfig(
            loaded.train.samples_per_shard,
            recipe.run.seed,
            recipe.data.lanes,
            window_of(recipe.data.window_shards, train.bytes, len(train.shards)),
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
        workers=_reader_threads(recipe),
    )


def _settle_compute(
    world: PartialState,
    recipe: Recipe,
    module: nn.Module,
    objective: Objective,
    loaded: Data,
    plan: Plan,
    display: Display,
) -> dict[Compute, float]:
    """Choose on rank 0 for all what a recipe leaves open of Compute, into the recipe; returns the measured seconds a step."""
    cpu = machine.read_cpu()
    choices = together(world, lambda: candidates(recipe.train, module, loaded.image_shape, world.device, cpu))
    choices = runtime.broadcast_object(world, choices)  # hosts may differ
    size = min(max(plan.global_batch_size // plan.world_size, 1), recipe.train.max_micro_batch, PROBE_SAMPLES)
    seconds: dict[Compute, float] = {}
    if len(choices) > 1:
        read = together(world, lambda: loaded.train_reader.read(np.arange(size)) if world.is_main_process else None)
        if read:
            images, labels = (part.to(world.device) for part in read)
            seconds = measure(choices, module, objective, loaded.normalize(images), labels)
    best = min(choices, key=lambda choice: seconds.get(choice, 0))
    chosen: Compute = runtime.broadcast_object(world, best)
    warning = together(world, lambda: check_precision(chosen.precision, world.device, module, cpu))
    if warning:
        display.warn(warning)
    _tell_what_is_missing(world, chosen, display)
    recipe.train.precision = chosen.precision
    recipe.train.memory_format = chosen.memory_format
    recipe.train.convolutions = chosen.convolutions
    return seconds


def _tell_what_is_missing(world: PartialState, chosen: Compute, display: Display) -> None:
    """Where a method for convolutions cannot be had, on a run that goes on elsewhere, say, torch's takes its place."""
    method = CONVOLUTION_METHODS.get(chosen.convolutions)
    lacking = method.missing() if method else None
    text = f"train.convolutions={chosen.convolutions} needs {lacking}: convolutions are torch's"
    if runtime.broadcast_object(world, lacking is not None):
        display.warn(text)
    elif lacking:
        display.tell(f"warning: rank {world.process_index}: {text} on this rank")


def _follow_rank_0(world: PartialState, recipe: Recipe) -> None:
    """Take what is settled of `auto` from rank 0: another host may not see the folder of the run that goes on."""
    settled = [(section, key, getattr(getattr(recipe, section), key)) for section, key in SETTLED]
    for section, key, value in runtime.broadcast_object(world, settled):
        setattr(getattr(recipe, section), key, value)


def _look_into_folder(recipe: Recipe, display: Display) -> Resume:
    """Find where to go on, in a folder that no other run can write to from now on. Rank 0."""
    folder = Path(recipe.run.dir)
    if is_run(folder):
        hold(folder, display.warn, _RESTART_PATIENCE_S if launcher.is_restarted() else 0)
    return find_resume(recipe)


def _claim_folder(
    accelerator: Accelerator, run_is_new: bool, recipe: Recipe, loaded: Data, state: TrainState, display: Display
) -> None:
    """Write what begins a run, or cut what a resumed one will do again. Rank 0 writes, all wait."""
    folder, problem = Path(recipe.run.dir), None
    if accelerator.is_main_process:
        try:
            aside = begin(folder, display.warn) if run_is_new else None
            if aside:
                display.note(f"the run that was in {folder} is now in {aside}")
            save_recipe(recipe, folder / CONFIG_NAME)
            write_whole(folder / MANIFEST_NAME, manifest_bytes(loaded.train.manifest))
            checkpoint_files.sweep(folder / "checkpoints")
            checkpoint_files.set_aside(folder / "checkpoints", state.progress.step)
            for lines in folder.glob("*.jsonl"):
                cut_lines(lines, state.progress.step, state.evaluation_due)
        except InputError as error:
            problem = error
        except OSError as error:
            problem = InputError(f"run.dir={folder} cannot be used: {error.strerror or error}")
    runtime.raise_together(accelerator, problem)
