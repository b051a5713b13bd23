"""Measure a forward and backward pass in each compute format, and choose one: the same one at every start.

The first passes of a format are slower because they compile its kernels, so every format is warmed up until its time is
stable. Then the formats take turns, and are compared round by round. What is measured is the processor time of one thread
with its share of the batch. Where other programs run, threads wait for each other: passes that should take 30 ms took up to
2 s on the clock, more in one format than in another, but at most twice their processor time (2 cores, torch 2.15).
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardstep.trainer.formats.candidates import DTYPES, MEMORY_FORMATS, ComputeFormat
from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, convert_convolutions
from shardstep.trainer.models.batch_norm import convert_batch_norm
from shardstep.trainer.optim.losses import Objective

_REPEATS_S = 1.4  # of processor time, for all but the first passes
_PASS_FLOPS = 2.5e9  # forward: long enough to tell formats apart, and short enough for several rounds
_FEWEST_SAMPLES = 4  # with fewer, large models spend their time on their weights, as steps of real batches do not
_MOST_SAMPLES = 64  # for layers whose operations are not counted
_STABLE = 1.25  # a time is stable once two passes in a row differ by at most this factor
_MOST_WARM_PASSES = 5
_MOST_ROUNDS = 12
_FAR_BEHIND = (2.0, 1.5)  # times the fastest's best pass: after the warm-up, and after each round
_HOPELESS = 2.0  # a precision that is so many times as slow is tried in one format only
_ENOUGH_PASSES = 3  # of the best guess and of a faster format, before that replaces it
_MARGIN = 1.08  # a format that takes at most so many times as long as the fastest is as good


ReadBatch = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class _Passes:
    """The seconds of a format's passes; `run` makes one more."""

    run: Callable[[], float]
    warm_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        return min(self.warm_s + self.seconds)

    @property
    def repeats_s(self) -> float:
        """All passes but the first, which compiles kernels; the fastest of the warm-up is also the first of `seconds`."""
        return sum(self.warm_s[1:] + self.seconds[1:])

    def warm_up(self) -> None:
        while len(self.warm_s) < _MOST_WARM_PASSES:
            self.warm_s.append(self.run())
            if len(self.warm_s) > 1 and max(self.warm_s[-2:]) <= _STABLE * min(self.warm_s[-2:]):
                break
        self.seconds.append(self.best_s)


def measure(
    formats: list[ComputeFormat], module: nn.Module, objective: Objective, read_batch: ReadBatch, batch_size: int
) -> tuple[dict[ComputeFormat, list[float]], int]:
    """Measure passes of the formats in turn, on this rank alone; the model does not change.

    Each precision is tried in its first format; the other formats of one that is then twice as slow as the fastest are left
    out. A format that is far behind drops out before the next round. Everything but the first passes takes at most 2 s,
    unless a few passes of a slow model take longer.

    Args:
        formats: at least two, the best guess first.
        read_batch: returns so many images (N, C, H, W) and labels (N,), on the device.
        batch_size: of the run, on one rank.

    Returns:
        The seconds of processor time of each format's passes: the fastest of its warm-up, then round by round; and the
        number of samples in a pass.
    """
    count = _sample_count(module, read_batch, batch_size)
    with _one_thread(), torch.random.fork_rng():  # dropout must not change the run's random numbers
        images, labels = read_batch(count)
        tried = _warm_up(formats, lambda compute: _pass_in(compute, module, objective, images, labels))
        _take_turns(list(tried.values()))
        _confirm(tried, guess=formats[0])
    return _seconds_of(tried), len(images)


def works_in(
    compute: ComputeFormat, module: nn.Module, objective: Objective, read_batch: ReadBatch, batch_size: int
) -> Exception | None:
    """Make one pass of a few samples in a format; return the error that it raises, or None. The model does not change."""
    with torch.random.fork_rng():
        images, labels = read_batch(min(batch_size, _FEWEST_SAMPLES))
        try:
            _pass_in(compute, module, objective, images, labels)()
        except Exception as error:
            return error
    return None


def _warm_up(
    formats: list[ComputeFormat], pass_in: Callable[[ComputeFormat], Callable[[], float]]
) -> dict[ComputeFormat, _Passes]:
    """Warm up the first format of each precision, then the other formats of those that are not hopeless; in given order."""

    def warm(compute: ComputeFormat) -> _Passes:
        passes = _Passes(pass_in(compute))
        passes.warm_up()
        return passes

    first_of = {compute.precision: compute for compute in reversed(formats)}
    tried = {compute: warm(compute) for compute in formats if compute in first_of.values()}
    limit_s = _HOPELESS * min(passes.best_s for passes in tried.values())
    hopeful = [compute for compute in formats if tried[first_of[compute.precision]].best_s <= limit_s]
    tried |= {compute: warm(compute) for compute in hopeful if compute not in tried}
    return {compute: tried[compute] for compute in formats if compute in tried}


def _take_turns(tried: list[_Passes]) -> None:
    """Make a pass of each format in turn, round by round, without those that are far behind, as long as there is time."""
    left = tried
    for rounds in range(_MOST_ROUNDS):
        limit_s = _FAR_BEHIND[min(rounds, len(_FAR_BEHIND) - 1)] * min(passes.best_s for passes in left)
        left = [passes for passes in left if passes.best_s <= limit_s]
        round_s = sum(passes.best_s for passes in left)
        is_late = sum(passes.repeats_s for passes in tried) + round_s > _REPEATS_S
        if len(left) == 1 or is_late:
            break
        for passes in left:
            passes.seconds.append(passes.run())


def _confirm(tried: dict[ComputeFormat, _Passes], guess: ComputeFormat) -> None:
    """Compare a choice other than the best guess with it in more rounds, if a slow model had time for one or two.

    So a single disturbed pass cannot replace the guess. A guess that is far behind needs no more passes.
    """
    for _ in range(_ENOUGH_PASSES * len(tried)):
        chosen = choose(_seconds_of(tried))
        is_far_behind = tried[guess].best_s > _FAR_BEHIND[-1] * tried[chosen].best_s
        if chosen == guess or is_far_behind or len(tried[chosen].seconds) >= _ENOUGH_PASSES:
            break
        for passes in (tried[guess], tried[chosen]):
            passes.seconds.append(passes.run())


def _seconds_of(tried: dict[ComputeFormat, _Passes]) -> dict[ComputeFormat, list[float]]:
    return {compute: passes.seconds for compute, passes in tried.items()}


def choose(seconds: dict[ComputeFormat, list[float]]) -> ComputeFormat:
    """Return the first format that is not clearly slower than the fastest, so that noise cannot choose between equals.

    A format is compared with the fastest by the ratios of their passes in the same rounds. It is clearly slower if it takes
    over 8 % longer in the median, and longer in three of four rounds, or if it was so far behind that it dropped out. Only
    a format that took part to the end can be the fastest.

    Args:
        seconds: as `measure` returns them, the best guess first.
    """
    rounds = max(map(len, seconds.values()))
    fastest = min(
        (compute for compute, passes in seconds.items() if len(passes) == rounds),
        key=lambda compute: statistics.median(seconds[compute]),
    )
    return next(compute for compute, passes in seconds.items() if not _is_slower(passes, seconds[fastest]))


def _is_slower(passes: list[float], fastest: list[float]) -> bool:
    ratios = sorted(one / other for one, other in zip(passes, fastest, strict=False))
    is_mostly_slower = ratios[len(ratios) // 4] > 1 or min(passes) > _FAR_BEHIND[-1] * min(fastest)
    return statistics.median(ratios) > _MARGIN and is_mostly_slower


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sample_count(module: nn.Module, read_batch: ReadBatch, batch_size: int) -> int:
    """Return how many samples to measure with: one thread's share of the batch, or fewer if a pass would take long."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a moment to import

    image, _ = read_batch(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).eval()(image)
    most = min(_MOST_SAMPLES, int(_PASS_FLOPS / max(counter.get_total_flops(), 1)))
    share = -(-batch_size // torch.get_num_threads())
    return min(batch_size, max(_FEWEST_SAMPLES, min(share, most)))


def _pass_in(
    compute: ComputeFormat, module: nn.Module, objective: Objective, images: Tensor, labels: Tensor
) -> Callable[[], float]:
    """Return a function that runs a forward and backward pass of a copy of the model, and returns its processor time.

    That of the calling thread, in which autograd runs the backward pass of a model on the CPU.
    """
    layout = MEMORY_FORMATS[compute.memory_format]
    model = copy.deepcopy(module).to(memory_format=layout).train()
    if compute.convolutions in CONVOLUTION_METHODS:
        convert_convolutions(model, compute.convolutions)
    convert_batch_norm(model, synchronised=False)  # the other ranks do not take part
    inputs = images.contiguous(memory_format=layout)

    def run() -> float:
        began = time.thread_time()
        with torch.autocast(images.device.type, DTYPES[compute.precision], enabled=compute.precision != "fp32"):
            outputs = model(inputs)
        objective.loss(outputs, inputs, labels).backward()
        return time.thread_time() - began

    return run
