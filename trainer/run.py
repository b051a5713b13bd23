"""Run: one training run, ready to start, with everything that the loop uses; and `assemble`, which puts it together."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from accelerate import Accelerator, PartialState

from shardstep.configs.durations import Duration
from shardstep.configs.resolve import ResolvedRecipe
from shardstep.configs.stop_when import parse_stop_when
from shardstep.datasets.batches import GlobalBatch, TrainBatches
from shardstep.trainer.checkpoints.saver import Saver
from shardstep.trainer.data import Data, make_test_batches, train_batches
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.bad_images import count_skipped, first_left_out
from shardstep.trainer.distributed.collectives import all_reduce_max
from shardstep.trainer.distributed.store import HeartbeatStore
from shardstep.trainer.distributed.world import synchronize_device
from shardstep.trainer.evaluation import Evaluation, TestBatches, evaluate
from shardstep.trainer.formats.kept_answers import Answer
from shardstep.trainer.metrics import Metrics
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.profiler import Profiler, parse_steps
from shardstep.trainer.monitoring.sample_log import SampleLog
from shardstep.trainer.monitoring.timing import Timer
from shardstep.trainer.monitoring.trackers import Trackers, start_trackers
from shardstep.trainer.optim.average import Average, averaged
from shardstep.trainer.optim.clip import Clip
from shardstep.trainer.optim.freeze import Freezer
from shardstep.trainer.optim.losses import Objective
from shardstep.trainer.optim.nan_guard import NonFiniteGuard
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.optim.schedules import LearningRate
from shardstep.trainer.origin import facts_of
from shardstep.trainer.run_dir import RunDir
from shardstep.trainer.state import TrainState
from shardstep.trainer.stopping.patience import Patience
from shardstep.trainer.stopping.stop_requests import StopRequests, StopSignal
from shardstep.trainer.stopping.time_limit import TimeLimit
from shardstep.trainer.stopping.watchdog import Watchdog


@dataclass(frozen=True)
class Every:
    """How often the loop logs, evaluates and saves."""

    log: Duration
    evaluation: Duration
    checkpoint: Duration


@dataclass
class Run:
    """One training run, ready to start.

    `initialized_s`: seconds that data-dependent initialisation took; `measured`: on rank 0, the measurement that the compute
    format was chosen by, if any.
    """

    recipe: ResolvedRecipe
    dir: RunDir
    accelerator: Accelerator
    state: TrainState
    plan: Plan
    data: Data
    batches: TrainBatches
    held_out_batches: TestBatches
    final_batches: TestBatches
    objective: Objective
    learning_rate: LearningRate
    clip: Clip
    average: Average
    freezer: Freezer
    every: Every
    metrics: Metrics
    display: Display
    trackers: Trackers
    nan_guard: NonFiniteGuard
    requests: StopRequests
    patience: Patience
    saver: Saver
    time_limit: TimeLimit
    watchdog: Watchdog
    sample_log: SampleLog | None
    timer: Timer
    profiler: Profiler
    initialized_s: float
    measured: Answer | None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.recipe.run.seed

    @property
    def is_over(self) -> bool:
        """Whether the run is over: by its duration, its time, or because it no longer improves."""
        state, plan = self.state, self.plan
        return plan.is_over(state.progress) or plan.is_out_of_time(state.train_s) or self.patience.is_over(state)

    @property
    def base_lr(self) -> float:
        """The learning rate that the schedule multiplies."""
        return float(self.recipe.optimizer["lr"])

    def evaluate(self, at_the_end: bool = False) -> Evaluation | None:
        """Evaluate the model on what is held out, or on the final set; return None if all ranks are to stop. All ranks."""
        self.requests.restart()
        part, batches, reader = self.data.held_out, self.held_out_batches, self.data.held_out_reader
        if at_the_end:
            part, batches, reader = self.data.final, self.final_batches, self.data.final_reader

        def stop_requested() -> bool:
            self.watchdog.beat(self.state.progress.step, "evaluating")
            return self.requests.check()

        with averaged(self.state):
            evaluation = evaluate(
                self.accelerator, self.state.module, batches, self.objective,
                part.samples, self.data.num_classes, self.recipe.eval, stop_requested, self.recipe.data.on_bad_image,
            )  # fmt: skip
        if evaluation and evaluation.bad_images:
            evaluation = replace(evaluation, first_bad_images=first_left_out(self.accelerator, reader, part))
        self.requests.restart()
        return evaluation

    def begin_step(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """Begin a step: tell the watchdog, sample log, profiler and timer; return its batch, which they watch."""
        batch = self.watchdog.watch(batch, step)
        if self.sample_log:
            batch = self.sample_log.watch(batch, step)  # each rank writes its own file
        self.profiler.begin_step(step)
        self.timer.begin_step()
        return batch


def assemble(
    accelerator: Accelerator,
    recipe: ResolvedRecipe,
    run_dir: RunDir,
    state: TrainState,
    plan: Plan,
    data: Data,
    objective: Objective,
    average: Average,
    wrap: Callable[..., None],
    display: Display,
    stop_signal: StopSignal,
    initialized_s: float,
    measured: Answer | None,
) -> Run:
    """Put a run together: add everything that watches, saves, stops and records to its model and data. All ranks.

    `wrap` wraps the model again after parameters have been frozen or unfrozen.
    """
    world, folder, share_done = accelerator.state, run_dir.path, lambda: plan.share_done(state.progress, state.train_s)
    trackers = _start_trackers(world, recipe, run_dir, state, display, stop_signal)
    saver = Saver(
        run_dir.checkpoints_path, recipe.checkpoint.keep, display.warn, state.best, [display.saved, trackers.saved]
    )
    time_limit = TimeLimit(launch_env.allocation(), lambda: saver.longest_s, share_done)
    freezer = Freezer(state.optimizer.param_groups, plan, state.module, wrap)
    if recipe.train.compile != "none":
        freezer.compile_ahead()
    every = Every(*(Duration.parse(text) for text in (recipe.log.every, recipe.eval.every, recipe.checkpoint.every)))
    clip = Clip(recipe.train.clip_norm, recipe.train.clip_value, measures=recipe.log.grad_norm)
    listeners = [display.line, trackers.log, lambda _: _note_early_outlook(time_limit, display)]
    profiled, on_gpu = parse_steps(recipe.train.profile), world.device.type == "cuda"
    synchronize_device(world.device)  # so that the first step does not pay for warm-up passes
    batches = train_batches(recipe, accelerator, data, plan)
    count_bad_images = partial(count_skipped, accelerator, batches, data.train.shards, state)
    return Run(
        recipe=recipe, dir=run_dir, accelerator=accelerator, state=state, plan=plan, data=data,
        batches=batches,
        held_out_batches=make_test_batches(recipe, accelerator, data.held_out_reader, data.held_out, data.normalize),
        final_batches=make_test_batches(recipe, accelerator, data.final_reader, data.final, data.normalize),
        objective=objective,
        learning_rate=LearningRate(recipe.schedule, plan.duration, plan.samples_per_epoch, plan.global_batch_size),
        clip=clip, average=average, freezer=freezer, every=every,
        metrics=Metrics(
            accelerator, run_dir.metrics_path, state, plan, every.evaluation, listeners, display.warn,
            has_accuracy=objective.classifies, clip=clip, evaluated_on=data.held_out_name,
            count_bad_images=count_bad_images if recipe.data.on_bad_image == "skip" else None,
        ),
        display=display, trackers=trackers, nan_guard=NonFiniteGuard(recipe.train),
        requests=StopRequests(
            stop_signal, folder, world.is_main_process, all_reduce_max(world), time_limit, plan.max_train_s
        ),
        patience=Patience(parse_stop_when(recipe.train.stop_when), plan.samples_per_epoch),
        saver=saver, time_limit=time_limit,
        watchdog=Watchdog(HeartbeatStore(world), folder, recipe.run.hang_timeout, stop_signal, display.tell),
        sample_log=SampleLog(folder, world.process_index, data.train.shards) if recipe.log.sample_keys else None,
        timer=Timer(world.device.type),
        profiler=Profiler(profiled, folder / "profile", world.process_index, on_gpu, display.note),
        initialized_s=initialized_s, measured=measured,
    )  # fmt: skip


def _start_trackers(
    world: PartialState,
    recipe: ResolvedRecipe,
    run_dir: RunDir,
    state: TrainState,
    display: Display,
    stop_signal: StopSignal,
) -> Trackers:
    if not world.is_main_process:
        return Trackers([], display.warn, display.note, stop_signal.has_arrived)
    facts = partial(facts_of, world.device, world.num_processes)
    return start_trackers(
        recipe, run_dir.path, run_dir.metrics_path, [run_dir.weights_path, run_dir.config_path], state, facts,
        display.warn, display.note, stop_signal.has_arrived,
    )  # fmt: skip


def _note_early_outlook(time_limit: TimeLimit, display: Display) -> None:
    outlook = time_limit.early_outlook()
    if outlook:
        display.note(outlook)
