"""TrainState: everything that changes during a run and must survive a restart, and nothing else."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardstep.configs.durations import Progress


@dataclass
class TrainState:
    """Everything that changes during a run and must survive a restart.

    It holds no random state: augmentation is keyed by (seed, epoch, position), dropout by (seed, step, rank).

    Attributes:
        module: the bare model.
        model: the same model, wrapped for training.
        scaler: of fp16, else None.
        average: average of the weights over the steps, by name, if the recipe asks for one.
        progress: how far the run is: steps, samples, and the position in the data.
        fingerprint: of the training set that `progress` counts in.
        test_fingerprint: of the test set that `best` was measured on.
        wall_s: seconds of training and evaluation, over all restarts.
        starts: for every start of the run: its first step, its number of ranks, and its time.
        best: step and metrics of the best evaluation, None before the first.
        patience: of train.stop_when, the best value so far, and the progress at it and at the last evaluation.
        evaluating_s: seconds of all evaluations, a part of wall_s.
        evaluation_due: whether the run was stopped before the evaluation that belongs to `progress`.
        sums: sums of loss and correct predictions since the last evaluation, per rank.
        samples_in_sums: number of samples in `sums`, over all ranks.
    """

    module: nn.Module
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scaler: torch.amp.GradScaler | None = None
    average: dict[str, Tensor] | None = None
    progress: Progress = field(default_factory=Progress)
    fingerprint: str = ""
    test_fingerprint: str = ""
    lr: float = 0.0  # of the last step
    wall_s: float = 0.0
    starts: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    patience: dict[str, Any] | None = None
    evaluation_s: float = 0.0  # the longest so far
    evaluating_s: float = 0.0
    evaluation_due: bool = False
    skipped_steps: int = 0  # because of a NaN or infinite loss or gradient
    bad_images: int = 0  # that others took the place of in training, over all ranks, see data.on_bad_image
    first_bad_images: list[dict[str, Any]] = field(default_factory=list)  # epoch, position, shard and key of the first
    sums: list[list[float]] = field(default_factory=list)
    samples_in_sums: int = 0
    wandb_id: str | None = None

    @property
    def train_s(self) -> float:
        """Seconds of training, without evaluations, over all restarts."""
        return self.wall_s - self.evaluating_s
