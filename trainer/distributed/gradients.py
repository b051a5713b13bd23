"""How ranks share their gradients: the recipe's train section and a model in; the size of DDP's buckets, one flat buffer, or
what is wrong with the choice out. The collectives themselves are in runtime.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardstep.configs.schema import TrainConfig

POWERSGD_RANK = 2  # Vogels et al. 2019, arXiv 1905.13727, table 3: as good as no compression for ResNet-18 on CIFAR-10
POWERSGD_START = 2  # the first step that may be compressed: torch's DDP arranges its buckets anew after its first pass
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of train.compile: with CUDA graphs on a GPU
_SMALL_NET_MB, _SMALL_BUCKET_MB, _LARGE_BUCKET_MB = 25, 1, 25


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients that the ranks share at every step, without compression."""
    return sum(value.numel() * value.element_size() for value in module.parameters() if value.requires_grad)


def bucket_mb(num_bytes: int, compress: str) -> int:
    """MiB of DDP's buckets for so many bytes of gradients.

    A bucket is reduced while the layers before it compute. torch's default of 25 MiB would make one bucket of a small net,
    whose reduction could only begin when the last gradient is there; 1 MiB in a large net would pay a latency for each.
    """
    if compress == "powersgd":
        # One for all: its hook waits for collectives in the callbacks of others, and with two buckets both of gloo's threads
        # would wait for ever (torch 2.15).
        return (num_bytes >> 20) + 1
    return _SMALL_BUCKET_MB if num_bytes <= _SMALL_NET_MB << 20 else _LARGE_BUCKET_MB


def describe_sharing(config: TrainConfig, module: nn.Module) -> str:
    """How the ranks share the gradients of a model, in a line."""
    num_bytes = gradient_bytes(module)
    how = (
        "in one buffer" if config.all_reduce == "flat" else f"in buckets of {bucket_mb(num_bytes, config.compress)} MiB"
    )
    compressed = "" if config.compress == "none" else f", which travel as {config.compress}"
    return f"{num_bytes / 1e6:.3g} MB a step, all-reduced {how}{compressed}"


def sharing_problems(config: TrainConfig) -> list[str]:
    """What cannot work in train.all_reduce and train.compress."""
    if config.compress != "powersgd":
        return []
    problems = []
    if config.all_reduce == "flat":
        problems.append(
            "train.compress=powersgd works on DDP's buckets, which train.all_reduce=flat does without: use "
            "all_reduce=buckets, or compress=bf16"
        )
    remembers = "train.compress=powersgd adds what it has left out of a gradient to the next one"
    if config.precision == "fp16":
        problems.append(
            f"{remembers}, and the first overflow of train.precision=fp16 would spoil all that follow: use bf16 or fp32"
        )
    if config.on_nan == "skip":
        problems.append(f"{remembers}, so that train.on_nan=skip could leave out no bad step: use on_nan=stop")
    return problems


def sharing_warnings(config: TrainConfig, world_size: int, resumed: bool) -> list[str]:
    """What a person should know about train.all_reduce and train.compress on the world that came up."""
    if world_size == 1:
        given = [("all_reduce", config.all_reduce, "buckets"), ("compress", config.compress, "none")]
        return [
            f"train.{key}={value} has no effect with one rank, which has nobody to share a gradient with"
            for key, value, default in given
            if value != default
        ]
    if config.compress == "powersgd" and resumed:
        return [
            "train.compress=powersgd begins anew: what it has left out of earlier gradients is not in a checkpoint, so the "
            "run goes on a little differently from one that was not interrupted"
        ]
    return []


def graphs_problem(config: TrainConfig, device_type: str, world_size: int, micro_steps: int) -> str:
    """Why CUDA graphs, which train.compile asks for, would fail; empty if they would not, or are not asked for."""
    if device_type != "cuda" or config.compile not in GRAPH_MODES:
        return ""
    if world_size > 1 and config.all_reduce == "buckets":  # pytorch#140395, #139207
        return "DDP's all-reduces hang in them, or keep them from being used; train.all_reduce=flat leaves them outside"
    if micro_steps > 1:  # pytorch#96693
        return "the gradients of a micro-step lie where the next one writes; a larger train.max_micro_batch makes one of them"
    return ""


class FlatGradients(nn.Module):
    """A model whose gradients lie side by side in one buffer, which one collective averages over the ranks.

    The buffer and the gradients in it keep their addresses from step to step, and the collective is one call on one tensor,
    after the backward pass and outside autograd.

    Args:
        module: the model, with the same weights on every rank; compiled, if it is to be: in here, assignments to .grad would
            break the compiler's graphs.
        average: replaces a tensor by its mean over all ranks.
    """

    def __init__(self, module: nn.Module, average: Callable[[Tensor], None]):
        super().__init__()
        self.module = module
        self._average = average
        self._buckets: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def lay_out(self) -> None:
        """Make room for the gradients that a backward pass has left, one buffer per number format, and forget these.

        Parameters that are frozen, or that the model does not use, keep no gradient, as on one rank. What was laid out before
        makes way: it would be shared, too.
        """
        self._buckets.clear()
        self._gradients.clear()
        parameters = [value for value in self.module.parameters() if value.grad is not None]
        for dtype in dict.fromkeys(value.dtype for value in parameters):
            alike = [value for value in parameters if value.dtype == dtype]
            bucket = torch.zeros(sum(value.numel() for value in alike), dtype=dtype, device=alike[0].device)
            self._buckets.append(bucket)
            self._gradients += zip(alike, _views(bucket, alike), strict=True)
        for value in parameters:
            value.grad = None

    def forward(self, images: Tensor) -> Tensor:
        """The model's outputs; gradients are added up in the buffer."""
        if self._gradients and self._gradients[0][0].grad is None:  # the optimizer has let go of them
            for bucket in self._buckets:
                bucket.zero_()
            for parameter, view in self._gradients:
                parameter.grad = view
        return forward(self.module, images)

    def average_gradients(self) -> None:
        """Share the gradients of a step after its last backward pass. All ranks."""
        for bucket in self._buckets:
            self._average(bucket)


def forward(model: nn.Module, images: Tensor) -> Any:
    """A training pass of a wrapped model. Without samples it is not compiled: convolutions would fail (torch 2.15)."""
    return model(images) if len(images) else uncompiled(model)(images)


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile was given."""
    return getattr(model, "_orig_mod", model)


def _views(bucket: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Parts of a buffer with the shapes and memory layouts of some parameters."""
    views, offset = [], 0
    for value in parameters:
        views.append(bucket.as_strided(value.shape, torch.empty_like(value).stride(), offset))  # channels_last stays so
        offset += value.numel()
    return views
