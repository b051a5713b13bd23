"""TrainState: all that changes while a run goes on, and nothing else. What is in it survives a restart."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardstep.configs.durations import Progress


@dataclass
class TrainState:
    """All that changes while a run goes on, and must survive its end.

    Random numbers are not among it: augmentation is keyed by (seed, epoch, position), dropout by (seed, step, rank).

    Attributes:
        module: the model, bare.
        model: the same as Accelerate wrapped it.
        optimizer: as Accelerate wrapped it.
        scaler: of fp16, else None.
        average: of the weights over the steps, by name, if one is kept.
        progress: how far the run has come: the position in the data, in steps and samples.
        fingerprint: of the training set that `progress` counts in.
        test_fingerprint: of the test set that `best` was measured on.
        lr: learning rate of the last step.
        wall_s: seconds of training and evaluation, over all restarts.
        starts: of every process of the run so far: the step it began at, its number of ranks, and when.
        best: step and figures of the best evaluation, None before the first.
        evaluation_s: seconds of the longest evaluation so far.
        evaluating_s: seconds of all evaluations, which are a part of wall_s.
        evaluation_due: whether a stop came before the evaluation that belongs to `progress`.
        skipped_steps: steps that were left out because their loss was no number.
        sums: per rank, loss and correct predictions since the last evaluation.
        samples_in_sums: how many samples these are of, over all ranks.
        wandb_id: of the run in Weights & Biases.
    """

    module: nn.Module
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scaler: torch.amp.GradScaler | None = None
    average: dict[str, Tensor] | None = None
    progress: Progress = field(default_factory=Progress)
    fingerprint: str = ""
    test_fingerprint: str = ""
    lr: float = 0.0
    wall_s: float = 0.0
    starts: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    evaluation_s: float = 0.0
    evaluating_s: float = 0.0
    evaluation_due: bool = False
    skipped_steps: int = 0
    sums: list[list[float]] = field(default_factory=list)
    samples_in_sums: int = 0
    wandb_id: str | None = None

    @property
    def train_s(self) -> float:
        """Seconds of training, without evaluations, over all restarts."""
        return self.wall_s - self.evaluating_s
