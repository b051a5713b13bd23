"""How the ranks share gradients (train.all_reduce, train.compress): checks, the size of DDP's buckets, one flat buffer.

The collectives themselves are in ddp.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.configs.schema import TrainConfig

POWERSGD_RANK = 2  # Vogels et al. 2019, arXiv 1905.13727, table 3: as good as no compression for ResNet-18 on CIFAR-10
POWERSGD_START = 2  # the first step that may be compressed: torch's DDP rearranges its buckets after its first pass
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # values of train.compile that use CUDA graphs on a GPU
_SMALL_NET_MB, _SMALL_BUCKET_MB, _LARGE_BUCKET_MB = 25, 1, 25


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of the gradients that the ranks all-reduce at every step, without compression."""
    return sum(value.numel() * value.element_size() for value in module.parameters() if value.requires_grad)


def bucket_mb(num_bytes: int, compress: str) -> int:
    """Return the MiB of DDP's buckets for so many bytes of gradients.

    DDP all-reduces a bucket while the backward pass computes earlier layers. torch's default of 25 MiB would put a small net
    into one bucket, whose all-reduce could only begin with the last gradient; 1 MiB in a large net would add many latencies.
    """
    if compress == "powersgd":
        # One bucket: the hook waits for collectives in the callbacks of others, and with two buckets both of gloo's threads
        # would wait forever (torch 2.15).
        return (num_bytes >> 20) + 1
    return _SMALL_BUCKET_MB if num_bytes <= _SMALL_NET_MB << 20 else _LARGE_BUCKET_MB


def describe_gradient_sync(config: TrainConfig, module: nn.Module) -> str:
    """Describe in a line how the ranks share the gradients of a model."""
    num_bytes = gradient_bytes(module)
    buckets = f"in buckets of {bucket_mb(num_bytes, config.compress)} MiB"
    how = "in one buffer" if config.all_reduce == "flat" else buckets
    compressed = "" if config.compress == "none" else f", sent as {config.compress}"
    return f"{num_bytes / 1e6:.3g} MB a step, all-reduced {how}{compressed}"


def gradient_sync_problems(config: TrainConfig) -> list[str]:
    """Return the problems of train.all_reduce and train.compress."""
    if config.compress != "powersgd":
        return []
    problems = []
    if config.all_reduce == "flat":
        problems.append(
            "train.compress=powersgd compresses DDP's buckets, which train.all_reduce=flat does not have: use "
            "all_reduce=buckets, or compress=bf16"
        )
    carries_over = "train.compress=powersgd adds what it left out of a gradient to the next one"
    if config.precision == "fp16":
        problems.append(
            f"{carries_over}, so the first overflow of train.precision=fp16 would spoil all later ones: use bf16 or fp32"
        )
    if config.on_nan == "skip":
        problems.append(f"{carries_over}, so train.on_nan=skip could not skip a bad step: use on_nan=stop")
    return problems


def gradient_sync_warnings(config: TrainConfig, world_size: int, resumed: bool) -> list[str]:
    """Return what to warn of in train.all_reduce and train.compress, in the world that came up."""
    if world_size == 1:
        given = [("all_reduce", config.all_reduce, "buckets"), ("compress", config.compress, "none")]
        return [
            f"train.{key}={value} has no effect with one rank, which shares its gradients with nobody"
            for key, value, default in given
            if value != default
        ]
    if config.compress == "powersgd" and resumed:
        return [
            "train.compress=powersgd starts over: checkpoints do not hold what it left out of earlier gradients, so the run "
            "will differ a little from an uninterrupted one"
        ]
    return []


def graphs_problem(config: TrainConfig, device_type: str, world_size: int, micro_steps: int) -> str:
    """Return why the CUDA graphs that train.compile asks for would fail; empty if they would not, or it asks for none."""
    if device_type != "cuda" or config.compile not in GRAPH_MODES:
        return ""
    if world_size > 1 and config.all_reduce == "buckets":  # pytorch#140395, #139207
        return "DDP's all-reduces hang in them or prevent them; train.all_reduce=flat keeps the all-reduce outside"
    if micro_steps > 1:  # pytorch#96693
        return "a micro-step would overwrite the gradients of the one before; a larger train.max_micro_batch needs only one"
    return ""


class FlatGradients(nn.Module):
    """A model whose gradients lie side by side in one buffer, which one all-reduce averages over the ranks.

    The buffer and the gradients in it keep their addresses from step to step. The all-reduce is one call on one tensor, after
    the backward pass and outside autograd.

    Args:
        module: the model, with the same weights on every rank. If it is to be compiled, it already is: the assignments to
            .grad in this class would break the compiler's graphs.
        average: replaces a tensor by its mean over all ranks.
    """

    def __init__(self, module: nn.Module, average: Callable[[Tensor], None]):
        super().__init__()
        self.module = module
        self._average = average
        self._buckets: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def lay_out(self) -> None:
        """Allocate one buffer per number format for the gradients that a backward pass has left, and drop these gradients.

        Parameters that are frozen, or that the model does not use, keep no gradient, as on one rank. Earlier buffers are
        dropped, because they would be all-reduced, too.
        """
        self._buckets.clear()
        self._gradients.clear()
        parameters = [value for value in self.module.parameters() if value.grad is not None]
        for dtype in dict.fromkeys(value.dtype for value in parameters):
            alike = [value for value in parameters if value.dtype == dtype]
            bucket = torch.zeros(sum(value.numel() for value in alike), dtype=dtype, device=alike[0].device)
            self._buckets.append(bucket)
            parts = bucket.split([value.numel() for value in alike])
            for value, part in zip(alike, parts, strict=True):  # channels_last stays so
                self._gradients.append((value, part.as_strided(value.shape, torch.empty_like(value).stride())))
        for value in parameters:
            value.grad = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's outputs; the backward pass adds the gradients up in the buffer."""
        if self._gradients and self._gradients[0][0].grad is None:  # zero_grad has dropped them
            for bucket in self._buckets:
                bucket.zero_()
            for parameter, view in self._gradients:
                parameter.grad = view
        return forward(self.module, images)

    def average_gradients(self) -> None:
        """Average the gradients of a step over the ranks, after its last backward pass. All ranks."""
        for bucket in self._buckets:
            self._average(bucket)


def forward(model: nn.Module, images: Tensor) -> Any:
    """Run the forward pass of a wrapped model; uncompiled where there are no samples, or convolutions fail (torch 2.15)."""
    return model(images) if len(images) else uncompiled(model)(images)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given."""
    return getattr(model, "_orig_mod", model)
