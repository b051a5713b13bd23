"""Wrap a model and its optimizer for training on every rank: DDP or one flat all-reduce, autocast, torch.compile."""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed import gradients
from shardstep.trainer.distributed.gradients import FlatGradients, uncompiled

_DDP_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "bf16": DDPCommunicationHookType.BF16,
    "fp16": DDPCommunicationHookType.FP16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
_SENT_AS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPILED_AT_MOST = 256  # graphs of one model: sizes of batches and images, times freezings; torch's limit is 8
_GRAPH_PASSES = 3  # until CUDA graphs are ready: one eager, one that is recorded, one that checks the recording


def wrap_for_training(
    accelerator: Accelerator,
    module: nn.Module,
    config: TrainConfig,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batches: list[Tensor],
    before: nn.Module | None = None,
    compiled_before: bool = False,
) -> nn.Module:
    """Wrap a model so that the ranks share its gradients, with autocast; compile it; broadcast rank 0's weights. All ranks.

    Call it again when parameters have been frozen or unfrozen: neither DDP nor a flat buffer notices.

    With several ranks, a warm-up pass whose gradient is discarded makes a resumed run add gradients in the same order as an
    uninterrupted one: DDP rearranges its buckets after its first backward pass, and from three ranks on gloo then sums in
    another order.

    Args:
        module: the bare model, on its device, without gradients.
        batches: images; the first batch is for the warm-up pass, and the compiler needs one of every shape.
        before: the result of the last call for this model, which becomes unusable. Each rank keeps its buffers then.
        compiled_before: the model has been compiled with the same parameters frozen.
    """
    before = None if before is None or before is module else uncompiled(before)
    own_buffers = [buffer.clone() for buffer in module.buffers()] if before is not None else []
    if isinstance(before, DistributedDataParallel):
        before._remove_autograd_hooks()  # or the old and the new one would both reduce
    _undo_autocast(module)
    _autocast_fp16_on_cpu(accelerator, module)
    alone = accelerator.num_processes == 1
    is_flat = config.all_reduce == "flat" and not alone
    accelerator.ddp_handler = _ddp_options(module, config)
    # A single rank that a launcher has started needs no DDP, which would keep CUDA graphs from its step.
    # No device placement: to check whether it may move the model, Accelerate would import all of DTensor, 0.7 s.
    model = accelerator.prepare_model(module, device_placement=False, evaluation_mode=is_flat or alone)
    if isinstance(model, DistributedDataParallel):
        # Buffers are averaged before evaluation; broadcasting them at every forward pass would cost a collective.
        # Set as an attribute, because the argument's name differs between torch versions.
        model.broadcast_buffers = False
    # The compiler recognizes a bare model, but not a new DDP.
    compiler_is_ready = compiled_before and not isinstance(model, DistributedDataParallel)
    if config.compile != "none":
        torch._dynamo.config.recompile_limit = _COMPILED_AT_MOST  # beyond it, torch runs uncompiled
        model = cast(nn.Module, torch.compile(model, mode=config.compile, dynamic=False))
    if is_flat:
        _broadcast_weights(module)
        model = FlatGradients(model, lambda values: _average(values, _SENT_AS[config.compress]))
    if config.compile != "none" and not compiler_is_ready:
        with_graphs = accelerator.device.type == "cuda" and config.compile in gradients.GRAPH_MODES
        for images in batches:
            for _ in range(_GRAPH_PASSES if with_graphs else 1):
                with accelerator.no_sync(model):  # no all-reduce: these gradients are discarded
                    _run_warmup_pass(accelerator, model, loss_of, images)
    if not alone:
        _run_warmup_pass(accelerator, model, loss_of, batches[0])
    with torch.no_grad():
        for buffer, own in zip(module.buffers(), own_buffers, strict=False):
            buffer.copy_(own)
    return model


def wrap_optimizer(accelerator: Accelerator, optimizer: Optimizer) -> AcceleratedOptimizer:
    """Wrap an optimizer in Accelerate's, which handles the scaler."""
    return accelerator.prepare_optimizer(optimizer)


def step_optimizer(optimizer: AcceleratedOptimizer) -> None:
    """Step an optimizer, through Accelerate's wrapper only if there is a scaler.

    Without one the wrapper only searches the disk for a missing library, twice a step, 0.3 ms (Accelerate 1.15).
    """
    (optimizer if optimizer.scaler is not None else optimizer.optimizer).step()


def average_gradients(model: nn.Module) -> bool:
    """Average a step's gradients over the ranks, unless DDP did in its backward pass; return whether it did. All ranks."""
    if isinstance(model, FlatGradients):
        model.average_gradients()
    return isinstance(model, FlatGradients)


def exposed_communication_s(model: nn.Module) -> float | None:
    """Return the mean seconds that DDP's backward pass waits for the ranks' gradients after computing its own; None if alone.

    DDP measures its first ten passes, and then one in a hundred.
    """
    wrapped = uncompiled(model)
    if not isinstance(wrapped, DistributedDataParallel):
        return None
    measured = wrapped._get_ddp_logging_data()  # times in nanoseconds
    if measured["world_size"] == 1:
        return None
    shared_ns = measured.get("avg_backward_comm_time", 0)
    return max(0, shared_ns - measured.get("avg_backward_compute_comm_overlap_time", 0)) / 1e9


def wrap_for_evaluation(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Move a model to its device, with autocast around its forward pass."""
    _autocast_fp16_on_cpu(accelerator, module)
    return accelerator.prepare_model(module.to(accelerator.device), device_placement=False, evaluation_mode=True)


def _ddp_options(module: nn.Module, config: TrainConfig) -> DistributedDataParallelKwargs:
    """Return DDP's options for Accelerate. static_graph stays off: it only saves a search for unused parameters, also off."""
    rank, start = gradients.POWERSGD_RANK, gradients.POWERSGD_START
    powersgd = {"matrix_approximation_rank": rank, "start_powerSGD_iter": start}
    return DistributedDataParallelKwargs(
        bucket_cap_mb=gradients.bucket_mb(gradients.gradient_bytes(module), config.compress),
        gradient_as_bucket_view=True,
        comm_hook=_DDP_HOOKS[config.compress],
        comm_state_option=powersgd if config.compress == "powersgd" else {},
    )


def _broadcast_weights(module: nn.Module) -> None:
    """Broadcast the weights, as DDP does: initial weights that different hosts computed may differ in their last bits."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)


def _average(values: Tensor, sent_as: torch.dtype | None) -> None:
    """Replace a tensor by its mean over all ranks; `sent_as` is the format of the all-reduce."""
    sent = values if sent_as is None else values.to(sent_as)
    sent /= dist.get_world_size()  # before the sum, which could overflow fp16
    dist.all_reduce(sent)
    if sent is not values:
        values.copy_(sent)


def _run_warmup_pass(
    accelerator: Accelerator, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], images: Tensor
) -> None:
    """Run a forward and backward pass and discard its gradient; the model does not change."""
    kept = [buffer.clone() for buffer in model.buffers()]
    outputs = model(images)  # alive during the backward pass, as in a step: CUDA graphs are recorded for just that
    accelerator.backward(loss_of(outputs, images))
    del outputs
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
    if isinstance(model, FlatGradients):
        model.lay_out()
    model.zero_grad()


def _autocast_fp16_on_cpu(accelerator: Accelerator, module: nn.Module) -> None:
    """Add autocast for fp16 on a CPU, as Accelerate does for the formats that it supports there."""
    if accelerator.device.type == "cpu" and accelerator.scaler is not None:
        module.__dict__["_original_forward"] = module.forward
        module.forward = torch.autocast("cpu", torch.float16)(module.forward)


def _undo_autocast(module: nn.Module) -> None:
    """Restore the forward pass that a model had before it was wrapped, so that Accelerate can wrap it again."""
    module.__dict__.pop("_is_accelerate_prepared", None)
    original = module.__dict__.pop("_original_forward", None)
    if original is not None:
        module.forward = original
