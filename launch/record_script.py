"""The method of the recipe speedrun94 as a script of its own, for `shardstep bench record --script` to compare with.

    python -m shardstep.launch.record_script TRAIN TEST SEED BATCH_SIZE STEPS

What one would write by hand after Jordan 2024, arXiv 2404.00498, with Muon on the filters: one process, the images in memory
in half precision, no checkpoints, no metrics, no other number of ranks. Eager on a CPU, in bf16 where it has units for it and
in fp32 elsewhere; compiled on a GPU, in fp16. It has a process of its own, because a trainer sets the C library's allocator,
and prints JSON: the test accuracy, and the seconds of initialisation, training and evaluation. Network, Muon and views are
the toolkit's.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.resident import load_resident
from shardstep.trainer import machine
from shardstep.trainer.models.whitening_cnn import WhiteningCnn, whitening_cnn
from shardstep.trainer.muon import FilterMuon
from shardstep.trainer.precision import halve
from shardstep.trainer.views import predict

_PAD = 2  # pixels
_BIAS_EPOCHS = 3  # of the whitening layer's bias
_BIAS_LR, _HEAD_LR, _FILTER_LR = 0.053, 0.67, 0.24
_DECAY = 2e-6  # times batch size, divided by the rate
_TEST_BATCH = 500
_INITIALIZE_IMAGES = 5000


def main(arguments: list[str]) -> int:
    """Train once and print what came out."""
    train_folder, test_folder = arguments[:2]
    seed, batch_size, steps = map(int, arguments[2:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "fp16" if device.type == "cuda" else "bf16" if machine.read_cpu().bf16_units else "fp32"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    scale = open_shards(train_folder).manifest
    images, labels = _load(train_folder, scale.mean, scale.std, device, dtype)
    test_images, test_labels = _load(test_folder, scale.mean, scale.std, device, dtype)
    if device.type == "cuda":  # compilation is not timed: once on dummy labels
        _train(images, labels.flip(0), batch_size, 3, precision)
    torch.manual_seed(seed)
    began = time.perf_counter()
    model, initialized = _train(images, labels, batch_size, steps, precision)
    trained = _now(device)
    accuracy = _accuracy(model, test_images, test_labels)
    ended = _now(device)
    found = {"accuracy": accuracy, "steps": steps, "initialize_s": initialized - began}
    print(json.dumps(found | {"train_s": trained - initialized, "evaluate_s": ended - trained}))
    return 0


def _load(
    folder: str, mean: list[float], std: list[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalised images (N, C, H, W), channels last, and labels int64 (N,)."""
    shards = open_shards(folder)
    reader = load_resident(shards, None, torch.device("cpu"))
    pixels, labels = reader.read(np.arange(shards.manifest.samples))
    values = (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return values.to(dtype).permute(0, 3, 1, 2).to(device), labels.to(device)


def _train(images: Tensor, labels: Tensor, batch_size: int, steps: int, precision: str) -> tuple[nn.Module, float]:
    """A trained model, and the time at which it was initialised."""
    device = images.device
    model = whitening_cnn(
        (3, 32, 32), 10, widths=(64, 256, 256), norm_momentum=0.4, norm_eps=1e-12, norm_scale=False,
        output_scale=1 / 256, unit_head=True,
    )  # fmt: skip
    assert isinstance(model, WhiteningCnn)
    model.to(device)
    model.to(memory_format=torch.channels_last)
    model.initialize(images[:_INITIALIZE_IMAGES].float())
    if precision != "fp32":
        halve(model, precision)
    initialized = _now(device)
    forward = torch.compile(model, mode="max-autotune") if device.type == "cuda" else model
    optimizers = _optimizers(model, batch_size)
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    flipped = torch.rand(len(images), device=device) < 0.5
    padded = functional.pad(images, (_PAD,) * 4, mode="reflect")
    steps_per_epoch = len(images) // batch_size
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            seen = _augmented(padded, flipped ^ bool(epoch % 2), images.shape[2])
            order = torch.randperm(len(images), device=device)
            model.whitening.bias.requires_grad_(epoch < _BIAS_EPOCHS)  # type: ignore[union-attr] # it has one
        chosen = order[place * batch_size : (place + 1) * batch_size]
        outputs = forward(seen[chosen]).float()
        loss = functional.cross_entropy(outputs, labels[chosen], label_smoothing=0.2, reduction="sum")
        for group, rate in rates:
            group["lr"] = rate * (1 - step / steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model.eval(), initialized


def _optimizers(model: WhiteningCnn, batch_size: int) -> list[torch.optim.Optimizer]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = model.head.weight
    biases = [parameter for parameter in trained if parameter.ndim == 1]
    decay = _DECAY * batch_size
    groups = [
        {"params": biases, "lr": _BIAS_LR, "weight_decay": decay / _BIAS_LR},
        {"params": [head], "lr": _HEAD_LR, "weight_decay": decay / _HEAD_LR},
    ]
    filters = [parameter for parameter in trained if parameter.ndim == 4]
    return [
        torch.optim.SGD(groups, momentum=0.85, nesterov=True),
        FilterMuon(filters, _FILTER_LR, 0.6, True, ns_steps=3, renormalize=True, weight_decay=0.0),
    ]


def _augmented(padded: Tensor, flipped: Tensor, size: int) -> Tensor:
    """All images of an epoch: each at a place of its own within its padding, some mirrored."""
    count, device = len(padded), padded.device
    places = 2 * _PAD + 1
    shifts = torch.randint(0, places, (count, 2), device=device)
    seen = torch.empty_like(padded[:, :, :size, :size], memory_format=torch.channels_last)
    for down in range(places):
        for right in range(places):
            here = (shifts[:, 0] == down) & (shifts[:, 1] == right)
            seen[here] = padded[here, :, down : down + size, right : right + size]
    return torch.where(flipped.view(-1, 1, 1, 1), seen.flip(3), seen)


@torch.inference_mode()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = 0
    for some, wanted in zip(images.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True):
        right += int((predict(model, some, "mirror_translate").argmax(dim=1) == wanted).sum())
    return right / len(labels)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
