"""Collectives: what all ranks call together, and what they do when one of them has a problem."""

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
    """Run a block that can fail on any rank, and that calls no collective; if it fails on one, all ranks raise. All ranks.

    Raises:
        InputError: each different message once, and which ranks it came from if not all.
    """
    problem = None
    try:
        yield
    except InputError as error:
        problem = error
    _raise_together(world, problem)


def _raise_together(world: PartialState, problem: InputError | None) -> None:
    """Raise on every rank if any rank has a problem, so that none waits in a collective for one that is gone."""
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
        raise InputError(
            "\n".join(
                message if len(ranks) == len(messages) else f"rank {', '.join(map(str, ranks))}: {message}"
                for message, ranks in ranks_of.items()
            )
        )


def broadcast_object(world: PartialState, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world.num_processes == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=world.device)
    return holder[0]


def all_reduce_max(world: PartialState) -> Callable[[list[int]], list[int]]:
    """A function that gives the largest of all ranks' numbers, place by place; every rank calls it. On the host."""
    if world.num_processes == 1:
        return lambda numbers: numbers
    # Beside NCCL there is a group for the host's own talk, so that no rank has to wait for its GPU to take part.
    group: Any = dist.new_group(backend="gloo") if world.device.type == "cuda" else None

    def largest(numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
        return values.tolist()

    return largest


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; gradients flow back through it."""
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
        # Every rank's loss depends on the sum, so what reaches one rank's values is the sum over all ranks' gradients.
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def reduce_sums(accelerator: Accelerator, sums: Sequence[Tensor]) -> list[Tensor]:
    """The sums of some float64 tensors over all ranks, in one collective."""
    if accelerator.num_processes == 1:
        return list(sums)
    flat = accelerator.reduce(torch.cat([values.flatten() for values in sums]), reduction="sum")
    return [part.view_as(values) for part, values in zip(flat.split([v.numel() for v in sums]), sums, strict=True)]


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; theirs stays as it is. All ranks."""
    if accelerator.num_processes == 1 or not values.numel():
        return values
    return accelerator.reduce(values, reduction="mean")


def gather_rows(accelerator: Accelerator, values: Tensor) -> list[list[float]]:
    """A float64 vector of each rank, by rank. All ranks."""
    return accelerator.gather(values.unsqueeze(0)).tolist()


def gather_buffers(accelerator: Accelerator, flat: Tensor) -> Tensor | None:
    """The vectors of all ranks as rows on the host; None where there is one rank, or nothing in them. All ranks."""
    if accelerator.num_processes == 1 or not flat.numel():
        return None
    return accelerator.gather(flat.to(accelerator.device).unsqueeze(0)).cpu()


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has left a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def time_all_reduce(world: PartialState, num_bytes: int, repeats: int) -> list[float]:
    """Seconds of each of some all-reduces of float32 numbers, after one that is not counted. All ranks."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(1 + repeats):
        world.wait_for_everyone()
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
