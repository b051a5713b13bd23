"""The loop: batches in, trained weights out. Start here.

Everything that the loop uses is built in setup.py and comes in as a Run; everything that it changes is in run.state.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.datasets.batches import GlobalBatch
from shardstep.datasets.randomness import derived_seed
from shardstep.trainer import checkpoint, runtime
from shardstep.trainer.checkpoint import TrainState
from shardstep.trainer.clip import Clip
from shardstep.trainer.evaluate import Evaluation
from shardstep.trainer.losses import Objective
from shardstep.trainer.metrics import Stopwatch
from shardstep.trainer.setup import Run


def train(run: Run) -> Evaluation | None:
    """Train until the recipe's duration is over; returns the last evaluation, or None if it was over before.

    Raises:
        TrainingFailed: the loss became NaN or infinite.
    """
    state, plan, metrics = run.state, run.plan, run.metrics
    if plan.is_over(state.progress):
        return None
    clock = Stopwatch(already_s=state.wall_s)
    metrics.restart_clock()

    for batch in run.batches.from_position(state.progress.epoch, state.progress.position):
        before, waited_before_s = state.progress, run.batches.wait_s
        rate_factor = run.learning_rate.factor(before)
        if run.sample_log:
            batch = run.sample_log.watch(batch, before.step + 1)  # each rank writes its own file
        sums = train_step(run.accelerator, state, batch, run.objective, rate_factor, run.clip, run.seed)
        state.progress = after = plan.advance(before, batch.size)
        over = plan.is_over(after)
        lr, epoch = run.base_lr * rate_factor, plan.epochs(after)

        waited_s = run.batches.wait_s - waited_before_s
        metrics.add(sums, batch.size, waited_s, state.optimizer.step_was_skipped)  # stays on the device
        run.display.advance(after.step)
        if over or plan.is_due(run.every.log, before, after):
            metrics.write_train(after, epoch, sums, batch.size, lr)  # all ranks reduce, rank 0 writes
        if over or plan.is_due(run.every.evaluation, before, after):
            evaluation = run.evaluate()  # all ranks
            state.wall_s = clock.seconds()
            metrics.write_evaluation(after, epoch, evaluation, lr, state.wall_s)
            metrics.restart_clock()
        if over or plan.is_due(run.every.checkpoint, before, after):
            metrics.check_finite(after)  # all ranks reduce
            state.wall_s = clock.seconds()
            runtime.average_buffers(run.accelerator, state.module)  # all ranks
            if run.accelerator.is_main_process:
                checkpoint.save(state, run.checkpoints, run.keep_checkpoints)  # rank 0 only
            metrics.restart_clock()
        if over:
            break
    return evaluation


def train_step(
    accelerator: Accelerator,
    state: TrainState,
    batch: GlobalBatch,
    objective: Objective,
    rate_factor: float,
    clip: Clip,
    seed: int,
) -> Tensor:
    """Take one optimizer step on one global batch.

    The gradient is that of the mean loss over the whole batch, for shares of any size: each micro-batch contributes its
    sum times world_size / batch size, and DDP divides by world_size when it averages over the ranks.

    Returns:
        This rank's sums over its share: loss and correct predictions; float64, shape (2,), on the device.
    """
    # Dropout is a function of (seed, step, rank): a resumed run needs no generator's state.
    runtime.seed_generator(accelerator.device, derived_seed(seed, state.progress.step, accelerator.process_index))
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor

    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for micro_step, micro in enumerate(batch.micro_batches, start=1):
        synchronised = micro_step == batch.num_micro_steps
        with nullcontext() if synchronised else accelerator.no_sync(state.model):
            outputs = state.model(micro.images)  # (b, C, H, W) -> (b, K)
            micro_loss = objective.loss(outputs, micro.images, micro.labels)  # a sum, not a mean
            accelerator.backward(micro_loss * (accelerator.num_processes / batch.size))
        with torch.no_grad():
            sums[0] += micro_loss
            sums[1] += objective.correct(outputs, micro.labels)
    clip(accelerator, state)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return sums
