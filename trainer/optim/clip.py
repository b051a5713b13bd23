"""Gradient clipping, after the all-reduce and before the optimizer's step."""

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.trainer.state import TrainState


class Clip:
    """Clips gradients by norm or by value, and measures the norm; does nothing if neither is asked for."""

    def __init__(self, norm: float | None = None, value: float | None = None, measures: bool = False):
        self._norm, self._value, self._measures = norm, value, measures
        self.norm_before: Tensor | None = None  # 2-norm of the last step's gradient before clipping, on the device

    def __call__(self, accelerator: Accelerator, state: TrainState) -> None:
        """Clip the averaged gradient of a step."""
        if self._norm is None and self._value is None and not self._measures:
            return
        if accelerator.scaler is not None:  # Accelerate's clipping ignores a scaler on the CPU
            accelerator.scaler.unscale_(state.optimizer.optimizer)
        parameters = [value for value in state.module.parameters() if value.grad is not None]
        if self._measures:
            self.norm_before = torch.nn.utils.get_total_norm([value.grad for value in parameters])  # type: ignore[misc]
        if self._norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._norm)
        elif self._value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self._value)
