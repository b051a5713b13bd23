"""Benchmark of convolutions: milliseconds of a forward and backward pass by each method of train.convolutions, on this CPU.

A method that training would not use for a layer is left out: its rule predicts no gain, or something is missing here.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shardstep.launch.benchmarks.bench_tables import Table, in_turn, whole_number

_LAYERS = ("64,64,15", "64,256,15", "256,256,7", "64,64,56", "512,512,7", "512,512,4", "256,256,3", "256,256,2")


class Layer(NamedTuple):
    """A 3x3 convolution with a border of zeros: channels in and out, and the side of its images in pixels."""

    inputs: int
    outputs: int
    side: int


def layer(text: str) -> Layer:
    """Parse an option's value such as 64,256,15."""
    numbers = text.split(",")
    if len(numbers) != len(Layer._fields):
        form = "give channels in, channels out and pixels, such as 64,256,15"
        raise argparse.ArgumentTypeError(f"{text} is not a layer: {form}")
    return Layer(*map(whole_number, numbers))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add, layers = parser.add_argument, f"channels and pixels (default: {' '.join(_LAYERS)})"
    add("--precision", choices=("bf16", "fp32"), help="(default: bf16 on a processor with bf16 units, else fp32)")
    add("--images", type=whole_number, default=128, help="images in a batch (default: %(default)s)")
    add("--layers", type=layer, nargs="+", default=[*map(layer, _LAYERS)], metavar="IN,OUT,SIDE", help=layers)


def measure(args: argparse.Namespace, folder: Path) -> Iterator[Table]:
    """Measure a table for each layer."""
    import torch

    from shardstep.trainer import machine
    from shardstep.trainer.distributed.world import keep_freed_memory
    from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS

    keep_freed_memory()
    precision = args.precision or ("bf16" if machine.read_cpu().bf16_units else "fp32")
    for one in args.layers:
        works = {"direct": _pass_ms(one, "direct", precision, args.images)}
        for name, method in CONVOLUTION_METHODS.items():
            convolution = torch.nn.Conv2d(one.inputs, one.outputs, 3, padding=1)
            gains = method.is_faster(convolution, torch.empty(args.images, one.inputs, one.side, one.side))
            if precision in method.precisions and gains and not method.missing():
                works[name] = _pass_ms(one, name, precision, args.images)
        title = f"{args.images} images of {one.side}x{one.side}, {one.inputs} to {one.outputs} channels, {precision}"
        yield Table(title, "ms", in_turn(works, args.repeats), "direct")


def _pass_ms(one: Layer, method: str, precision: str, count: int) -> Callable[[], float]:
    import torch

    from shardstep.trainer.formats.candidates import DTYPES
    from shardstep.trainer.kernels.convolutions import CONVOLUTION_METHODS, convert_convolutions

    convolution = torch.nn.Conv2d(one.inputs, one.outputs, 3, padding=1).to(memory_format=torch.channels_last)
    if method in CONVOLUTION_METHODS:
        convert_convolutions(convolution, method)
    dtype = DTYPES[precision]
    autocast = partial(torch.autocast, "cpu", dtype, enabled=precision != "fp32")
    images = torch.randn(count, one.inputs, one.side, one.side)
    images = images.to(dtype, memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad(), autocast():
        gradient = torch.randn_like(convolution(images))

    def measured() -> float:
        began = time.perf_counter()
        with autocast():
            outputs = convolution(images)
        torch.autograd.grad(outputs, (images, convolution.weight), gradient)
        return 1000 * (time.perf_counter() - began)

    return measured
