"""Gradient clipping, after the ranks have shared the gradient and before the optimizer sees it."""

import torch
from accelerate import Accelerator

from shardstep.trainer.checkpoint import TrainState


class Clip:
    """Gradient clipping by norm or by value; does nothing when both limits are None."""

    def __init__(self, norm: float | None = None, value: float | None = None):
        self._norm, self._value = norm, value

    def __call__(self, accelerator: Accelerator, state: TrainState) -> None:
        """Clip the gradient of a step, which the ranks already share."""
        if self._norm is None and self._value is None:
            return
        if accelerator.scaler is not None:  # Accelerate's own clipping overlooks a scaler on the CPU
            accelerator.scaler.unscale_(state.optimizer.optimizer)
        parameters = [value for value in state.module.parameters() if value.grad is not None]
        if self._norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._norm)
        elif self._value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self._value)
