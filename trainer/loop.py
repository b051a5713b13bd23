"""The training loop: batches in, trained weights out. Start reading here.

setup.py builds everything that the loop uses, as a Run (run.py); everything that the loop changes is in run.state.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from shardstep.datasets.batches import GlobalBatch
from shardstep.datasets.rng import derived_seed
from shardstep.trainer.distributed.ddp import average_gradients, step_optimizer
from shardstep.trainer.distributed.gradients import forward
from shardstep.trainer.distributed.world import seed_generator
from shardstep.trainer.evaluation import Evaluation
from shardstep.trainer.metrics import Stopwatch
from shardstep.trainer.periodic import evaluate_now, save
from shardstep.trainer.run import Run


@dataclass(frozen=True)
class TrainResult:
    """How training ended: on request (stopped=True) or by its duration; and its last evaluation, if there was one."""

    stopped: bool
    evaluation: Evaluation | None


def train(run: Run) -> TrainResult:
    """Train until the recipe's duration is over, train.stop_when ends the run, or all ranks have agreed to stop.

    Raises:
        NonFiniteError: the loss is NaN or infinite; with train.on_nan=skip, at more steps than train.max_skipped_steps.
    """
    state, plan, metrics, requests = run.state, run.plan, run.metrics, run.requests
    clock = Stopwatch(already_s=state.wall_s)
    run.timer.start()
    evaluation = evaluate_now(run, clock) if state.evaluation_due else None  # the last start was stopped before it
    over = run.is_over
    if over or requests.stop:
        return TrainResult(stopped=not over or state.evaluation_due, evaluation=evaluation)

    metrics.restart_clock()
    for batch in run.batches.from_position(state.progress.epoch, state.progress.position):
        before, waited_before_s = state.progress, run.batches.wait_s
        run.freezer.set_for(before)  # all ranks, when optimizer.groups say `from` or `until`
        batch = run.begin_step(batch, before.step + 1)
        sums = train_step(run, batch)
        state.progress = after = plan.advance(before, batch.size)
        state.lr = run.base_lr * run.learning_rate.factor(before)
        run.average.update(state, before)
        state.wall_s = clock.seconds()
        requests.check(train_s=state.train_s)  # all ranks, about twice a second
        over = plan.is_over(after) or requests.out_of_time

        waited_s = run.batches.wait_s - waited_before_s
        metrics.add(sums, batch.size, waited_s, state.optimizer.step_was_skipped)  # stays on the device
        run.display.advance(after.step)
        if over or plan.is_due(run.every.log, before, after):
            metrics.write_train(state, plan.epochs(after), sums, batch.size)  # all ranks reduce, rank 0 writes
        improved = False
        if over or plan.is_due(run.every.evaluation, before, after):
            evaluation = evaluate_now(run, clock)  # all ranks; None if they are to stop
            improved = state.best is not None and state.best["step"] == after.step
            over = over or run.patience.is_over(state)
        due = improved or plan.is_due(run.every.checkpoint, before, after)
        if over or due or requests.stop or requests.save:
            save(run, clock)  # all ranks enter, rank 0 writes
        if over or requests.stop:
            break
    return TrainResult(stopped=not over or state.evaluation_due, evaluation=evaluation)


def train_step(run: Run, batch: GlobalBatch) -> Tensor | None:
    """Take one optimizer step on one global batch.

    The gradient is that of the mean loss (or of its sum) over the global batch, exactly, even if the ranks' shares differ in
    size: each micro-batch contributes its sum times world_size / batch size, and the all-reduce divides by world_size.

    Returns:
        The sums of loss and correct predictions over this rank's share: float64, shape (2,), on the device. None if the
        step was skipped because its loss or gradient was NaN or infinite.
    """
    accelerator, state, objective, timer = run.accelerator, run.state, run.objective, run.timer
    # Dropout is a function of (seed, step, rank), so that a checkpoint needs no generator's state.
    seed_generator(accelerator.device, derived_seed(run.seed, state.progress.step, accelerator.process_index))
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * run.learning_rate.factor(state.progress, group.get("until"))
    run.nan_guard.keep_buffers(state)

    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for micro_step, micro in enumerate(batch.micro_batches, start=1):
        timer.mark("data")
        is_last = micro_step == batch.num_micro_steps
        with nullcontext() if is_last else accelerator.no_sync(state.model):  # DDP all-reduces in the last one
            outputs = forward(state.model, micro.images)  # (b, C, H, W) -> (b, K)
            micro_loss = objective.loss(outputs, micro.images, micro.labels)  # a sum, not a mean
            timer.mark("forward")
            accelerator.backward(micro_loss * (accelerator.num_processes / objective.divisor(batch.size)))
            timer.mark("backward")
        with torch.no_grad():
            sums[0] += micro_loss
            sums[1] += objective.correct(outputs, micro.labels)
        timer.mark("other")
    if average_gradients(state.model):  # only with train.all_reduce=flat
        timer.mark("communication")
    skip = run.nan_guard.found_nonfinite(accelerator, state, sums)  # the same on all ranks
    if not skip:
        run.clip(accelerator, state)
        step_optimizer(state.optimizer)
    state.optimizer.optimizer.zero_grad()
    timer.mark("optimizer")
    return None if skip else sums
