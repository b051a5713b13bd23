"""Collectives: operations that all ranks call together, and how a problem of one rank is raised on all."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import Tensor

from shardstep.configs.errors import InputError


@contextmanager
def raise_on_all_ranks(world: PartialState) -> Iterator[None]:
    """Run a block that may fail on any rank, and calls no collective; if it fails on one rank, all raise. All ranks.

    Raises:
        InputError: lists each different message once, with its ranks unless it came from all.
    """
    problem = None
    try:
        yield
    except InputError as error:
        problem = error
    if world.num_processes == 1:
        if problem:
            raise problem
        return
    messages: list[str | None] = [None] * world.num_processes
    dist.all_gather_object(messages, str(problem) if problem else None)
    ranks_of: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            ranks_of.setdefault(message, []).append(rank)
    if ranks_of:
        lines = (
            message if len(ranks) == len(messages) else f"rank {', '.join(map(str, ranks))}: {message}"
            for message, ranks in ranks_of.items()
        )
        raise InputError("\n".join(lines))


def broadcast_object(world: PartialState, value: Any) -> Any:
    """Return rank 0's value on every rank. All ranks."""
    if world.num_processes == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=world.device)
    return holder[0]


def all_reduce_max(world: PartialState) -> Callable[[list[int]], list[int]]:
    """Return a function for the element-wise maximum of all ranks' numbers, on the host; every rank calls it."""
    if world.num_processes == 1:
        return lambda numbers: numbers
    # With NCCL, the host gets a separate gloo group, so that no rank has to wait for its GPU.
    group: Any = dist.new_group(backend="gloo") if world.device.type == "cuda" else None

    def largest(numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
        return values.tolist()

    return largest


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; gradients flow back through it. All ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return _AllReduceSum.apply(values)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on the sum, so the gradient of one rank's values is the sum of all ranks' gradients.
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def reduce_sums(accelerator: Accelerator, sums: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of some float64 tensors over all ranks, with one all-reduce. All ranks."""
    if accelerator.num_processes == 1:
        return list(sums)
    flat = accelerator.reduce(torch.cat([values.flatten() for values in sums]), reduction="sum")
    return [part.view_as(values) for part, values in zip(flat.split([v.numel() for v in sums]), sums, strict=True)]


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks; the tensor does not change. All ranks."""
    if accelerator.num_processes == 1 or not values.numel():
        return values
    return accelerator.reduce(values, reduction="mean")


def gather_rows(accelerator: Accelerator, values: Tensor) -> list[list[float]]:
    """Return the float64 vectors of all ranks, by rank. All ranks."""
    return accelerator.gather(values.unsqueeze(0)).tolist()


def gather_samples(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the rows of all ranks, of which each may have another number, in the order of the ranks. All ranks."""
    if accelerator.num_processes == 1:
        return values
    counts = accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = accelerator.gather(padded).split(max(counts))
    return torch.cat([part[:rows] for part, rows in zip(parts, counts, strict=True)])


def gather_buffers(accelerator: Accelerator, flat: Tensor) -> Tensor | None:
    """Return the vectors of all ranks as rows on the host; None with one rank, or if they are empty. All ranks."""
    if accelerator.num_processes == 1 or not flat.numel():
        return None
    return accelerator.gather(flat.to(accelerator.device).unsqueeze(0)).cpu()


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error means that another rank has left a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def time_all_reduce(world: PartialState, num_bytes: int, repeats: int) -> list[float]:
    """Measure the seconds of each of `repeats` all-reduces of float32 numbers, after a warm-up. All ranks."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(1 + repeats):
        world.wait_for_everyone()
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
