"""The method of the recipe speedrun94 as a standalone script: the baseline of `shardstep bench record --script`.

    python -m shardstep.launch.benchmarks.record_script TRAIN TEST BATCH_SIZE STEPS DEVICE < SEEDS

A hand-written version of Jordan 2024, arXiv 2404.00498, with Muon on the filters: one process on one device, the images in
memory in half precision, no checkpoints, no metrics. On a CPU it runs eagerly, in bf16 if the processor has bf16 units, else
in fp32. On a GPU it is compiled and runs in fp16, after a complete run on dummy labels that is not timed. It runs in a
separate process, because the trainer changes the C library's allocator. Reads seeds, one a line, and prints a line of JSON
for each as soon as it has trained with it: the test accuracy, and the seconds of initialisation, training and evaluation. The
network, Muon and the views are the toolkit's.
"""

import json
import sys
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.resident import load_resident
from shardstep.launch.benchmarks.bare_loop import now
from shardstep.trainer import machine
from shardstep.trainer.models.views import predict
from shardstep.trainer.models.whitening_cnn import WhiteningCnn, whitening_cnn
from shardstep.trainer.optim.muon import FilterMuon
from shardstep.trainer.precision import halve

_PAD = 2  # pixels
_BIAS_EPOCHS = 3  # of the whitening layer's bias
_BIAS_LR, _HEAD_LR, _FILTER_LR = 0.053, 0.67, 0.24
_DECAY = 2e-6  # times batch size, divided by the learning rate
_TEST_BATCH = {"cpu": 500, "cuda": 2000}  # on a CPU, what fits into its caches
_INITIALIZE_IMAGES = 5000


def main(arguments: list[str]) -> int:
    """Train with each seed and print the accuracy and the times."""
    train_folder, test_folder = arguments[:2]
    batch_size, steps = map(int, arguments[2:4])
    device = torch.device(arguments[4])
    precision = "fp16" if device.type == "cuda" else "bf16" if machine.read_cpu().bf16_units else "fp32"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    scale = open_shards(train_folder).manifest
    images, labels = _load(train_folder, scale.mean, scale.std, device, dtype)
    test_images, test_labels = _load(test_folder, scale.mean, scale.std, device, dtype)
    model = _network().to(device)
    model.to(memory_format=torch.channels_last)
    if precision != "fp32":
        halve(model, precision)
    forward: nn.Module = model
    if device.type == "cuda":  # do not time compilation, nor recompilation when the first layer's bias is frozen
        forward = cast(nn.Module, torch.compile(model, mode="max-autotune", dynamic=False))
        _train(model, forward, images, labels.flip(0), batch_size, steps)
        _accuracy(forward, test_images, test_labels)
    for line in sys.stdin:
        torch.manual_seed(int(line))
        began = now(device)
        initialized = _train(model, forward, images, labels, batch_size, steps)
        trained = now(device)
        accuracy = _accuracy(forward, test_images, test_labels)
        ended = now(device)
        found = {"accuracy": accuracy, "steps": steps, "initialize_s": initialized - began}
        print(json.dumps(found | {"train_s": trained - initialized, "evaluate_s": ended - trained}), flush=True)
    return 0


def _load(
    folder: str, mean: list[float], std: list[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return normalised images (N, C, H, W), channels last, and labels int64 (N,)."""
    shards = open_shards(folder)
    reader = load_resident(shards, None, torch.device("cpu"))
    pixels, labels = reader.read(np.arange(shards.manifest.samples))
    values = (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return values.to(dtype).permute(0, 3, 1, 2).to(device), labels.to(device)


def _network() -> WhiteningCnn:
    model = whitening_cnn(
        (3, 32, 32), 10, widths=(64, 256, 256), norm_momentum=0.4, norm_eps=1e-12, norm_scale=False,
        output_scale=1 / 256, unit_head=True,
    )  # fmt: skip
    assert isinstance(model, WhiteningCnn)
    return model


def _train(
    model: WhiteningCnn, forward: nn.Module, images: Tensor, labels: Tensor, batch_size: int, steps: int
) -> float:
    """Reinitialise and train a model in place, through `forward`; return the time after initialisation."""
    device = images.device
    model.load_state_dict(_network().state_dict())
    model.initialize(images[:_INITIALIZE_IMAGES].float())
    model.train()
    initialized = now(device)
    steps_per_epoch = len(images) // batch_size
    optimizers = _optimizers(model, batch_size, _BIAS_EPOCHS * steps_per_epoch)
    flipped = torch.rand(len(images), device=device) < 0.5
    padded = functional.pad(images, (_PAD,) * 4, mode="reflect")
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            seen = _augmented(padded, flipped ^ bool(epoch % 2), images.shape[2])
            order = torch.randperm(len(images), device=device)
            _bias(model).requires_grad_(epoch < _BIAS_EPOCHS)  # when frozen, the backward pass ends before it
        chosen = order[place * batch_size : (place + 1) * batch_size]
        outputs = forward(seen[chosen]).float()
        loss = functional.cross_entropy(outputs, labels[chosen], label_smoothing=0.2, reduction="sum")
        _set_lrs(optimizers, step, steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
    return initialized


def _optimizers(model: WhiteningCnn, batch_size: int, bias_steps: int) -> list[torch.optim.Optimizer]:
    """Build them; groups have their initial lr as `base_lr`, and as `steps` when it reaches 0, if before the end."""
    first, head = _bias(model), model.head.weight
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    biases = [parameter for parameter in trained if parameter.ndim == 1 and parameter is not first]
    decay = _DECAY * batch_size
    groups = [
        {"params": [first], "lr": _BIAS_LR, "weight_decay": decay / _BIAS_LR, "steps": bias_steps},
        {"params": biases, "lr": _BIAS_LR, "weight_decay": decay / _BIAS_LR},
        {"params": [head], "lr": _HEAD_LR, "weight_decay": decay / _HEAD_LR},
    ]
    filters = [parameter for parameter in trained if parameter.ndim == 4]
    product_dtype = torch.float32 if head.dtype == torch.float32 else torch.bfloat16
    optimizers = [
        torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=head.device.type == "cuda"),
        FilterMuon(filters, _FILTER_LR, 0.6, True, 3, renormalize=True, weight_decay=0.0, product_dtype=product_dtype),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _set_lrs(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Decay every learning rate linearly to 0."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * max(0.0, 1 - step / group.get("steps", steps))


def _bias(model: WhiteningCnn) -> Tensor:
    assert model.whitening.bias is not None
    return model.whitening.bias


def _augmented(padded: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Augment all images of an epoch: shift each randomly within its padding, and mirror some."""
    count, device = len(padded), padded.device
    places = 2 * _PAD + 1
    shifts = torch.randint(0, places, (count, 2), device=device)
    seen = torch.empty_like(padded[:, :, :size, :size], memory_format=torch.channels_last)
    for down in range(places):
        for right in range(places):
            here = (shifts[:, 0] == down) & (shifts[:, 1] == right)
            seen[here] = padded[here, :, down : down + size, right : right + size]
    return torch.where(flipped.view(-1, 1, 1, 1), seen.flip(3), seen)


@torch.no_grad()
def _accuracy(forward: nn.Module, images: Tensor, labels: Tensor) -> float:
    size, right = _TEST_BATCH[images.device.type], torch.zeros((), dtype=torch.long, device=images.device)
    for some, wanted in zip(images.split(size), labels.split(size), strict=True):
        right += (predict(forward, some, "mirror_translate").argmax(dim=1) == wanted).sum()
    return right.item() / len(labels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
