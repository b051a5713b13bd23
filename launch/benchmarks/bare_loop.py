"""The article's net in a hand-written loop: the baseline of `shardstep bench step`.

    python -m shardstep.launch.benchmarks.bare_loop BATCH_SIZE STEPS PRECISION

No ranks, no checkpoints, no metrics. It runs in a separate process, because the trainer changes the C library's allocator and
how the processor treats denormal numbers. Prints the images per second of its last STEPS steps, after as many to warm up.
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardstep.trainer.models.article_cnn import article_cnn

NUM_IMAGES = 2048


def main(arguments: list[str]) -> int:
    """Train and print the images per second."""
    batch_size, steps, precision = int(arguments[0]), int(arguments[1]), arguments[2]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    model, optimizer = article_net(device)
    images, labels = images_and_labels(device)
    began = 0.0
    for step in range(2 * steps):
        if step == steps:
            began = now(device)
        batch, targets = random_batch(images, labels, batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(batch)
        loss = functional.cross_entropy(outputs.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(steps * batch_size / (now(device) - began))
    return 0


def article_net(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the net, and Adam with the article's learning rate."""
    torch.manual_seed(0)
    model = article_cnn((3, 32, 32), 10).to(device)
    model.to(memory_format=torch.channels_last)
    return model, torch.optim.Adam(model.parameters(), lr=0.001)


def images_and_labels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random images uint8 (N, 3, 32, 32), channels last, and labels (N,)."""
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (NUM_IMAGES,), device=device)
    return images.to(device, memory_format=torch.channels_last), labels


def random_batch(images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return a random batch with the article's normalisation."""
    chosen = torch.randint(0, len(images), (batch_size,), device=images.device)
    return (images[chosen].float() / 255 - 0.1307) / 0.3081, labels[chosen]


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
