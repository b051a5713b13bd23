"""The loop: batches in, trained weights out. Start here.

Everything that the loop uses is built in setup.py and comes in as a Run (run.py); everything that it changes is in run.state.
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
    """How training ended, by its duration (stopped=False) or on request, and its last evaluation, if there was one."""

    stopped: bool
    evaluation: Evaluation | None


def train(run: Run) -> TrainResult:
    """Train until the recipe's duration is over, or all ranks have agreed to stop.

    Raises:
        TrainingFailed: the loss became NaN or infinite; with train.on_nan=skip, at more steps than may be left out.
    """
    state, plan, metrics, requests = run.state, run.plan, run.metrics, run.requests
    clock = Stopwatch(already_s=state.wall_s)
    run.timer.start()
    evaluation = evaluate_now(run, clock) if state.evaluation_due else None  # the last start was stopped before it
    over = plan.is_over(state.progress) or plan.is_out_of_time(state.train_s)
    if over or requests.stop:
        return TrainResult(stopped=not over or state.evaluation_due, evaluation=evaluation)

    metrics.restart_clock()
    for batch in run.batches.from_position(state.progress.epoch, state.progress.position):
        before, waited_before_s = state.progress, run.batches.wait_s
        run.freezer.freeze_due(before)  # once in a while, all ranks
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
            evaluation = evaluate_now(run, clock)  # all ranks; nothing if they are to stop
            improved = state.best is not None and state.best["step"] == after.step
        due = improved or plan.is_due(run.every.checkpoint, before, after)
        if over or due or requests.stop or requests.save:
            save(run, clock)  # all ranks enter, rank 0 writes
        if over or requests.stop:
            break
    return TrainResult(stopped=not over or state.evaluation_due, evaluation=evaluation)


def train_step(run: Run, batch: GlobalBatch) -> Tensor | None:
    """Take one optimizer step on one global batch.

    The gradient is that of the mean loss (or its sum) over the whole batch, for shares of any size: each micro-batch
    contributes its sum times world_size / batch size, and the average over the ranks divides by world_size.

    Returns:
        This rank's sums over its share: loss and correct predictions; float64, shape (2,), on the device. None if the
        step was left out because its loss or gradient was no number.
    """
    accelerator, state, objective, timer = run.accelerator, run.state, run.objective, run.timer
    # Dropout is a function of (seed, step, rank): a resumed run needs no generator's state.
    seed_generator(accelerator.device, derived_seed(run.seed, state.progress.step, accelerator.process_index))
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * run.learning_rate.factor(state.progress, group.get("until"))
    run.nan_guard.begin(state)

    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for micro_step, micro in enumerate(batch.micro_batches, start=1):
        timer.mark("data")
        synchronised = micro_step == batch.num_micro_steps
        with nullcontext() if synchronised else accelerator.no_sync(state.model):
            outputs = forward(state.model, micro.images)  # (b, C, H, W) -> (b, K)
            micro_loss = objective.loss(outputs, micro.images, micro.labels)  # a sum, not a mean
            timer.mark("forward")
            accelerator.backward(micro_loss * (accelerator.num_processes / objective.divisor(batch.size)))
            timer.mark("backward")
        with torch.no_grad():
            sums[0] += micro_loss
            sums[1] += objective.correct(outputs, micro.labels)
        timer.mark("other")
    if average_gradients(state.model):  # with train.all_reduce=flat; DDP has done it in the last backward pass
        timer.mark("communication")
    bad = run.nan_guard.is_bad(accelerator, state, sums)  # all ranks agree
    if not bad:
        run.clip(accelerator, state)
        step_optimizer(state.optimizer)
    state.optimizer.optimizer.zero_grad()
    timer.mark("optimizer")
    return None if bad else sums
