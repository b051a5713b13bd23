"""What imported code must keep to, checked on one batch before a run begins. docs/extending.md has the same in more words.

Each check raises an InputError that says what was given, what came back, and the contract. Errors that the code itself
raises pass through: see configs/imported.py.
"""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardstep.configs.components import first_line
from shardstep.configs.durations import Progress
from shardstep.configs.errors import InputError
from shardstep.configs.imported import call
from shardstep.datasets.augment import Transform
from shardstep.datasets.rng import Draws
from shardstep.trainer.optim.schedules import Clock

MODEL = (
    "a model takes images, float (B, channels, height, width), and returns logits, float (B, classes), or images of the same "
    "shape for a loss that compares images"
)
EMPTY = (
    "B is 0 where the last batch of an epoch leaves a rank without samples, so use flatten(1) rather than view(B, -1)"
)
LOSS = (
    "a loss takes outputs, float (B, classes), and labels, and returns one loss for each sample, float (B,), as torch's do "
    "with reduction='none'; the loop takes the mean over the global batch"
)
TRANSFORM = (
    "a transform takes images, uint8 (B, height, width, channels), and draws, and returns images of the same type and shape; "
    "what becomes of an image depends on it and its draws alone"
)
DRAWS = (
    "a transform takes random numbers from its argument draws alone, so that they do not depend on ranks and restarts"
)
SCHEDULE = (
    "a schedule takes a Clock and returns the factor on the learning rate, a finite number, without keeping any state"
)
AVERAGE = "an average takes slow, fast and share_done, changes the tensors of slow in place, and returns None"
OPTIMIZER = (
    "an optimizer takes parameter groups, and keeps what it remembers of earlier steps in self.state, as tensors and numbers "
    "by parameter, or in its param_groups: a checkpoint has these alone"
)
PROBED_SAMPLES = 16
_TOLERANCE = 1e-3  # relative; a sum in another order rounds otherwise


def check_model(name: str, module: nn.Module, images: Tensor, num_classes: int) -> None:
    """Check a model in evaluation mode on images (B, C, H, W).

    Raises:
        InputError: its outputs have neither the shape of logits nor that of the images.
    """
    outputs = call(f"model.name={name}", module, images)
    if not _is_float(outputs) or outputs.shape not in ((len(images), num_classes), images.shape):
        raise InputError(
            f"model.name={name} returned {_kind(outputs)} for images {_kind(images)} and {num_classes} classes: {MODEL}"
        )


def check_empty_batch(name: str, module: nn.Module, images: Tensor) -> None:
    """Check a model in evaluation mode on an empty batch of images.

    Raises:
        InputError: it fails, or does not return an empty batch.
    """
    try:
        empty = module(images[:0])
    except Exception as error:
        raise InputError(
            f"model.name={name} fails on images {_kind(images[:0])} ({first_line(error)}): {EMPTY}"
        ) from None
    if not _is_float(empty) or len(empty):
        raise InputError(f"model.name={name} returned {_kind(empty)} for images {_kind(images[:0])}: {EMPTY}")


def check_loss(name: str, loss: Callable[[Tensor, Tensor], Any], outputs: Tensor, labels: Tensor) -> None:
    """Check a loss on outputs (B, K) and labels (B,), or shares of classes (B, K).

    Raises:
        InputError: it does not return one loss for each sample, or one that depends on other samples, or no gradient.
    """
    outputs = outputs.detach().float().requires_grad_()
    with torch.enable_grad():
        losses = loss(outputs, labels)
    given = f"outputs {_kind(outputs)} and labels {_kind(labels)}"
    if not _is_float(losses) or losses.shape != labels.shape[:1]:
        raise InputError(f"loss.name={name} returned {_kind(losses)} for {given}: {LOSS}")
    if not losses.requires_grad:
        raise InputError(f"loss.name={name} returned losses without a gradient for {given}: {LOSS}")
    alone = [loss(outputs[row : row + 1], labels[row : row + 1]) for row in range(len(labels))]
    if any(one.shape != (1,) for one in alone):
        raise InputError(
            f"loss.name={name} returned {_kind(alone[0])} for one sample, for {given} beside others: {LOSS}"
        )
    if not torch.allclose(torch.cat(alone), losses, rtol=_TOLERANCE, atol=1e-5, equal_nan=True):
        raise InputError(
            f"loss.name={name} returned another loss for a sample alone than beside others, for {given}: {LOSS}"
        )


def check_transform(name: str, transform: Transform, pixels: Tensor, may_be_empty: bool) -> Tensor:
    """Check a transform on images, uint8 (B, H, W, C); return what it makes of them.

    Raises:
        InputError: type or shape change, an image depends on others, or the numbers come from elsewhere than its draws.
    """
    rows = [slice(None), slice(1), *([slice(0)] if may_be_empty else [])]
    with _generators_kept():
        before = _generator_states(pixels.device)
        whole, alone, *empty = (transform(pixels[part].clone(), _draws(pixels, part)) for part in rows)
        drawn_from = [kind for kind, state in _generator_states(pixels.device).items() if state != before[kind]]
        for made, part in zip((whole, alone, *empty), rows, strict=True):
            given = pixels[part]
            if not isinstance(made, Tensor) or (made.dtype, made.shape, made.device) != (
                torch.uint8,
                given.shape,
                given.device,
            ):
                raise InputError(f"data.augment: {name} returned {_kind(made)} for images {_kind(given)}: {TRANSFORM}")
        if drawn_from:
            raise InputError(
                f"data.augment: {name} draws from the global generator of {' and '.join(drawn_from)}: {DRAWS}"
            )
        if not torch.equal(whole, transform(pixels.clone(), _draws(pixels, slice(None)))):
            raise InputError(f"data.augment: {name} returned other images for the same images and draws: {DRAWS}")
    if not torch.equal(whole[:1], alone):
        raise InputError(f"data.augment: {name} returned another image for one alone than beside others: {TRANSFORM}")
    return whole


def check_schedule(name: str, function: Callable[..., Any], options: dict[str, Any], samples_per_epoch: int) -> None:
    """Check a schedule at the start, in the middle and at the end of a run.

    Raises:
        InputError: it returns no finite number, or two for one clock.
    """
    for fraction in (0.0, 0.5, 1.0):
        progress = Progress(step=0, epoch=0, position=0)
        clock = Clock(progress, samples_per_epoch, fraction)
        factors = [function(clock, **options) for _ in range(2)]
        is_number = all(isinstance(one, int | float) and math.isfinite(one) for one in factors)
        if not is_number or factors[0] != factors[1]:
            got = factors[0] if factors[0] == factors[1] else f"{factors[0]}, then {factors[1]}"
            raise InputError(f"schedule.name={name} returned {got!r} at {fraction:.0%} of the run: {SCHEDULE}")


def check_average(name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Check an average on one tensor.

    Raises:
        InputError: it returns something, or replaces the tensor.
    """
    slow, fast = [torch.zeros(3)], [torch.ones(3)]
    kept = slow[0]
    with torch.no_grad():
        returned = function(slow, fast, 1.0, **options)
    if returned is not None or slow[0] is not kept or kept.shape != (3,):
        raise InputError(f"average.name={name} returned {_kind(returned)}: {AVERAGE}")


def check_optimizer(build: Callable[[nn.Module], Optimizer], module: nn.Module) -> None:
    """Check on copies of a model that an optimizer goes on equally after its state was saved and loaded.

    Raises:
        InputError: it does not.
    """
    one, other = copy.deepcopy(module), copy.deepcopy(module)
    optimizer = build(one)
    for _ in range(2):
        _step(optimizer, one)
    other.load_state_dict(one.state_dict())
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_module in ((optimizer, one), (resumed, other)):
        _step(each, its_module)
    for (name, value), resumed_value in zip(one.named_parameters(), other.parameters(), strict=True):
        if not torch.equal(value, resumed_value):
            raise InputError(
                f"optimizer: the third step of {name} differs after its state was saved and loaded: {OPTIMIZER}"
            )


def _step(optimizer: Optimizer, module: nn.Module) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for value in module.parameters():
            if value.requires_grad:
                value.grad = 0.1 * value + 0.01
        optimizer.step()


def _draws(pixels: Tensor, part: slice) -> Draws:
    places = torch.arange(len(pixels))[part]
    return Draws(0, 0, places, places, pixels.device)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _generator_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "random": random.getstate()}
    states["numpy"] = [np.asarray(part).tobytes() for part in np.random.get_state(legacy=True)]
    if device.type == "cuda":
        states["torch on the GPU"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the global generators as they were before the block."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_random)
            np.random.set_state(of_numpy)
