"""With train.on_nan=skip: skip and count single steps whose loss or gradient is NaN or infinite."""

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.configs.errors import NonFiniteError
from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed.collectives import reduce_sums
from shardstep.trainer.state import TrainState


class NonFiniteGuard:
    """Checks every step with train.on_nan=skip. With stop it checks none: metrics do, on log steps."""

    def __init__(self, config: TrainConfig):
        self._skips = config.on_nan == "skip"
        self._most = config.max_skipped_steps
        self._buffers: list[Tensor] = []

    def keep_buffers(self, state: TrainState) -> None:
        """Copy what the forward pass of a skipped step would spoil: batch norm's running statistics."""
        if self._skips:
            self._buffers = [buffer.clone() for buffer in state.module.buffers()]

    def found_nonfinite(self, accelerator: Accelerator, state: TrainState, sums: Tensor) -> bool:
        """Return whether to skip the step, because a rank found NaN or infinity; restore the buffers if so. All ranks reduce.

        Raises:
            NonFiniteError: more than train.max_skipped_steps have been skipped.
        """
        if not self._skips:
            return False
        nonfinite = ~sums[0].isfinite()
        if accelerator.scaler is None:  # fp16's scaler skips a step whose gradient overflows by itself
            gradients = [value.grad for value in state.module.parameters() if value.grad is not None]
            nonfinite |= ~torch.nn.utils.get_total_norm(gradients).isfinite()
        (num_ranks,) = reduce_sums(accelerator, [nonfinite.double().unsqueeze(0)])
        if not num_ranks.item():
            return False
        with torch.no_grad():
            for buffer, before in zip(state.module.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        state.skipped_steps += 1
        if state.skipped_steps > self._most:
            raise NonFiniteError(
                f"step {state.progress.step + 1} is the {state.skipped_steps}th whose loss or gradient is NaN or infinite, "
                f"and train.max_skipped_steps={self._most}. Try a lower optimizer.lr, train.clip_norm=1.0, or check the data"
            )
        return True
