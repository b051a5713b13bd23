"""Answers to which compute format is fastest, kept in the node's cache: measured at the first start, read at later ones.

A file per question, in `formats/` of the cache folder. `shardstep doctor RECIPE --measure` measures again.
"""

import contextlib
import dataclasses
import hashlib
import json
import statistics
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardstep.configs.cores import usable_cores
from shardstep.configs.files import write_atomically
from shardstep.configs.text import count
from shardstep.datasets.cache import cache_folder
from shardstep.trainer import machine
from shardstep.trainer.formats import measurement
from shardstep.trainer.formats.candidates import ComputeFormat
from shardstep.trainer.optim.losses import Objective


@dataclass(frozen=True)
class Question:
    """Which of these formats is fastest here for a model and a loss, as the recipe has them, on batches of a rank."""

    formats: list[ComputeFormat]
    model: dict[str, Any]
    loss: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    code: str = ""  # digest of the code that model and loss come from, if the recipe names it by import path

    def as_json(self) -> dict[str, Any]:
        """Return everything that the answer depends on."""
        asked = {key: value for key, value in dataclasses.asdict(self).items() if key != "code" or value}
        return asked | {
            "formats": [str(compute) for compute in self.formats],
            "image_shape": list(self.image_shape),
            "processor": dataclasses.asdict(machine.read_cpu()),
            "cores": usable_cores().count,
            "threads": torch.get_num_threads(),
            "versions": machine.versions(),
        }


@dataclass(frozen=True)
class Answer:
    """A choice, the median seconds of a pass in each format (see measure), when it was measured, and on how many samples.

    `kept_in` is the file that an earlier start kept it in; None if it was measured just now.
    """

    chosen: ComputeFormat
    seconds: dict[ComputeFormat, float]
    samples: int
    measured: str
    kept_in: Path | None = None

    def __str__(self) -> str:
        times = ", ".join(f"{compute} {1000 * value:.0f} ms" for compute, value in self.seconds.items())
        origin = f"measured on {self.measured[:10]}, kept in {self.kept_in}" if self.kept_in else "measured"
        return f"{origin}: {times} for {count(self.samples, 'image')}"


def measured_answer(
    question: Question,
    module: nn.Module,
    objective: Objective,
    read_batch: measurement.ReadBatch,
    anew: bool = False,
) -> Answer:
    """Return the answer that was kept for a question, or measure it on this rank alone, and keep it.

    Args:
        read_batch: returns so many images (N, C, H, W) and labels (N,), on the device.
        anew: whether to measure even if an answer is kept.
    """
    asked = json.dumps(question.as_json(), sort_keys=True)
    digest = hashlib.sha256(asked.encode()).hexdigest()
    path = cache_folder() / "formats" / f"{digest[:16]}.json"
    if not anew and (kept := _read(path, question, asked)):
        return kept
    passes, samples = measurement.measure(question.formats, module, objective, read_batch, question.batch_size)
    answer = Answer(
        chosen=measurement.choose(passes),
        seconds={compute: statistics.median(seconds) for compute, seconds in passes.items()},
        samples=samples,
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    evidence = {str(compute): seconds for compute, seconds in passes.items()}
    found = {"chosen": str(answer.chosen), "measured": answer.measured, "samples": samples, "seconds": evidence}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a measurement at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps({"question": json.loads(asked)} | found, indent=1) + "\n").encode())
    return answer


def _read(path: Path, question: Question, asked: str) -> Answer | None:
    """Read the answer that is kept in a file; None if there is none, it is damaged, or it answers another question."""
    try:
        found = json.loads(path.read_bytes())
        if json.dumps(found["question"], sort_keys=True) != asked:
            return None
        formats = {str(compute): compute for compute in question.formats}
        seconds = {formats[name]: statistics.median(passes) for name, passes in found["seconds"].items()}
        return Answer(formats[found["chosen"]], seconds, int(found["samples"]), str(found["measured"]), path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
