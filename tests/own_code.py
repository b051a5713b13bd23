"""Code of a user's, for recipes that name it by import path: one of each kind, and files that break their contracts."""

import textwrap
from pathlib import Path
from typing import Any

FILES = {
    "blocks.py": """
        from torch import nn

        class Block(nn.Sequential):
            def __init__(self, channels, width):
                super().__init__(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    """,
    "net.py": """
        from blocks import Block
        from torch import nn

        def net(image_shape, num_classes, *, width: int = 4, dropout: float = 0.2):
            pooled = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(dropout))
            return nn.Sequential(Block(image_shape[0], width), pooled, nn.Linear(16 * width, num_classes))
    """,
    "transform.py": """
        import torch

        def brighten(images, draws, *, most: int = 40):
            amount = draws.integers(most)[:, :, None, None]
            return (images.long() + amount).clamp(max=255).to(torch.uint8)
    """,
    "loss.py": """
        from torch.nn import functional

        def tempered(outputs, labels, *, temperature: float = 2.0):
            return functional.cross_entropy(outputs.float() / temperature, labels, reduction="none")
    """,
    "optim.py": """
        import torch

        class Heavy(torch.optim.Optimizer):
            def __init__(self, parameters, *, lr: float = 0.05, momentum: float = 0.8):
                super().__init__(parameters, {"lr": lr, "momentum": momentum})

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for value in group["params"]:
                        velocity = self.state[value].setdefault("velocity", torch.zeros_like(value))
                        velocity.mul_(group["momentum"]).add_(value.grad)
                        value.sub_(group["lr"] * velocity)
    """,
    "schedule.py": """
        def fall(clock, *, end: float = 0.1):
            return 1 - (1 - end) * clock.fraction
    """,
    "average.py": """
        import torch

        def follow(slow, fast, share_done, *, weight: float = 0.2, every: str = "1 steps"):
            torch._foreach_lerp_(slow, [value.to(kept.dtype) for kept, value in zip(slow, fast)], weight)
    """,
    "images.py": """
        import numpy as np
        from shardstep.datasets.sources.source import Source

        def stripes(split):
            labels = np.arange(40 if split == "train" else 20) % 2

            def read(number):
                pixels = np.zeros((8, 8, 3), np.uint8)
                pixels[:: 2 + labels[number], :, number % 3] = 200 + number
                return pixels

            return Source("stripes", ["narrow", "wide"], labels, read, "stripes {}".format)
    """,
}
OWN: dict[str, Any] = {
    "model": {"name": "net.py:net", "sync_batch_norm": True},
    "loss": {"name": "loss.py:tempered", "temperature": 1.5},
    "optimizer": {"name": "optim.py:Heavy", "lr": 0.04},
    "schedule": {"name": "schedule.py:fall", "end": 0.5},
    "average": {"name": "average.py:follow"},
}
AUGMENT = ["flip", {"name": "transform.py:brighten", "most": 30}]


def write_code(folder: Path, **files: str) -> Path:
    """Write FILES, and others by stem, to a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (FILES | {f"{stem}.py": text for stem, text in files.items()}).items():
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))
    return folder


def write_own_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    """A small recipe whose every part is the user's own, with the code beside it."""
    from tests.runs import write_recipe

    write_code(folder)
    sections = OWN | {"data": {"augment": AUGMENT}} | sections
    return write_recipe(folder, shards, **sections)
