"""Batch norm for several ranks: it handles single values and empty shares, or computes statistics over all ranks."""

import torch
from torch import Tensor, nn

from shardstep.trainer.distributed.collectives import all_reduce_sum


class RankBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over one rank's samples, which also accepts a single value per channel.

    torch refuses a single value, because it has no variance: a rank whose share of a short batch is one image would fail at
    a 1x1 feature map. Here the running statistics normalise such a value, and do not change.
    """

    def forward(self, images: Tensor) -> Tensor:
        if self.training and images.numel() == self.num_features and self.running_mean is not None:
            return nn.functional.batch_norm(
                images, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(images)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with training statistics over the global batch, on any backend; torch's SyncBatchNorm refuses CPUs.

    A rank's share may be empty.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        values = images.float()  # (B, C, H, W); half precision is too coarse for the sums
        count = all_reduce_sum(values.new_full((), values.numel() // values.shape[1]))
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


def convert_batch_norm(model: nn.Module, synchronised: bool) -> int:
    """Turn every BatchNorm2d of a model into one of these classes, with the same parameters; return how many there are."""
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in found:
        module.__class__ = SyncBatchNorm2d if synchronised else RankBatchNorm2d
    return len(found)
