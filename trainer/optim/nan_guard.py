"""Single steps whose loss or gradient is no number: left out and counted, if the recipe says so."""

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.configs.errors import NonFiniteError
from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed.collectives import reduce_sums
from shardstep.trainer.state import TrainState


class NonFiniteGuard:
    """With train.on_nan=skip, looks at every step; with stop, at none: metrics do on log steps."""

    def __init__(self, config: TrainConfig):
        self._skips = config.on_nan == "skip"
        self._most = config.max_skipped_steps
        self._buffers: list[Tensor] = []

    def begin(self, state: TrainState) -> None:
        """Keep what the forward pass of a bad step would spoil: batch norm's running statistics."""
        if self._skips:
            self._buffers = [buffer.clone() for buffer in state.module.buffers()]

    def is_bad(self, accelerator: Accelerator, state: TrainState, sums: Tensor) -> bool:
        """Whether the step must be left out; then the buffers are as before it. All ranks reduce, and agree.

        Raises:
            NonFiniteError: it would be one too many.
        """
        if not self._skips:
            return False
        bad = ~sums[0].isfinite()
        if accelerator.scaler is None:  # which leaves out an overflow of the gradient by itself
            gradients = [value.grad for value in state.module.parameters() if value.grad is not None]
            bad |= ~torch.nn.utils.get_total_norm(gradients).isfinite()
        (count,) = reduce_sums(accelerator, [bad.double().unsqueeze(0)])
        if not count.item():
            return False
        with torch.no_grad():
            for buffer, before in zip(state.module.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        state.skipped_steps += 1
        if state.skipped_steps > self._most:
            raise NonFiniteError(
                f"step {state.progress.step + 1} is the {state.skipped_steps}th whose loss or gradient is no number, and "
                f"train.max_skipped_steps={self._most}. Try a lower optimizer.lr, train.clip_norm=1.0, or look at the data"
            )
        return True
