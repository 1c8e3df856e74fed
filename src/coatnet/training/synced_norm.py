"""BatchNorm whose statistics are those of the global batch, on any device; torch's own knows CUDA alone.

With it the updates of any number of ranks are equal up to rounding. It costs an exchange at each norm, forward and
back, so it is for shares too small to speak for the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coatnet.ranks import Ranks


def synchronise(network: nn.Module, ranks: Ranks) -> None:
    """Give the network's BatchNorm layers, in place, the statistics of all ranks; names and weights stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncedBatchNorm
            module.__dict__["ranks"] = ranks


class _SyncedBatchNorm(nn.BatchNorm2d):
    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that BatchNorm2d gives it)
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_tensor(x.numel() // x.shape[1])
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count.expand(x.shape[1])])
        total, squares, count = self.ranks.sum_with_gradient(sums)
        mean = total / count
        variance = squares / count - mean.square()
        self._note(mean.detach(), (variance * count / (count - 1)).detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        if self.num_batches_tracked is not None:  # None while a block is gone through again
            self.num_batches_tracked += 1
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
