"""Batch norm over the batches of all ranks, on any backend: torch's own refuses CPU tensors."""

import torch
from torch import Tensor, nn

from shardstep.trainer.runtime import all_reduce_sum


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the global batch. A rank's own part may be empty."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        values = images.float()  # (B, C, H, W); half precision would not carry the sums
        count = all_reduce_sum(values.new_tensor(float(values.numel() // values.shape[1])))
        mean = all_reduce_sum(values.sum(dim=(0, 2, 3))) / count  # (C,)
        centred = values - mean.view(1, -1, 1, 1)
        variance = all_reduce_sum(centred.square().sum(dim=(0, 2, 3))) / count  # of the centred values: no cancellation
        self._update_running(mean.detach(), variance.detach(), count)
        normalised = centred * (variance + self.eps).rsqrt().view(1, -1, 1, 1)
        if self.affine:
            normalised = normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised.to(images.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), weight)  # unbiased, as torch does


def convert_batch_norm(model: nn.Module) -> int:
    """Turn every BatchNorm2d of a model into a SyncBatchNorm2d with the same parameters; returns how many."""
    found = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for module in found:
        module.__class__ = SyncBatchNorm2d
    return len(found)


def undo_sync_batch_norm(model: nn.Module) -> None:
    """Turn every SyncBatchNorm2d of a model back into torch's BatchNorm2d."""
    for module in model.modules():
        if type(module) is SyncBatchNorm2d:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment] # the class it was converted from
