"""Gradient clipping, after the ranks have shared the gradient and before the optimizer sees it."""

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.trainer.state import TrainState


class Clip:
    """Gradient clipping by norm or by value; does nothing when both limits are None and nothing is to be measured."""

    def __init__(self, norm: float | None = None, value: float | None = None, measures: bool = False):
        self._norm, self._value, self._measures = norm, value, measures
        self.norm_before: Tensor | None = None  # 2-norm of the last step's gradient as it came, on the device

    def __call__(self, accelerator: Accelerator, state: TrainState) -> None:
        """Clip the gradient of a step, which the ranks already share."""
        if self._norm is None and self._value is None and not self._measures:
            return
        if accelerator.scaler is not None:  # Accelerate's own clipping overlooks a scaler on the CPU
            accelerator.scaler.unscale_(state.optimizer.optimizer)
        parameters = [value for value in state.module.parameters() if value.grad is not None]
        if self._measures:
            self.norm_before = torch.nn.utils.get_total_norm([value.grad for value in parameters])  # type: ignore[misc]
        if self._norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._norm)
        elif self._value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self._value)
