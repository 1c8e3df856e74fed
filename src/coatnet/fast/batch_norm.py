"""BatchNorm in training, between kernels: what it does to a map once the map's moments are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Moments:
    """What a BatchNorm in training does to a map, and what its backward mixes."""

    def __init__(self, sums: Tensor, count: int, norm: nn.BatchNorm2d) -> None:
        total, squares = sums.double().sum(dim=1) / count
        variance = (squares - total.square()).clamp(min=0)
        self.count, self.mean, self.inverse = count, total.float(), (variance + norm.eps).rsqrt().float()
        self.weight = norm.weight.detach()
        self.factor = self.weight * self.inverse
        self.shift = norm.bias.detach() - self.mean * self.factor
        _follow(norm, self.mean, variance.float() * (count / max(1, count - 1)))

    @property
    def fields(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "shift": self.shift}

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and what mixes slope and map to the map's gradient, (3, C)."""
        bias_slope, with_map = sums.sum(dim=1)
        weight_slope = self.inverse * (with_map - self.mean * bias_slope)
        by_map = -self.factor * self.inverse * weight_slope / self.count
        rest = -self.factor * bias_slope / self.count - by_map * self.mean
        return weight_slope, bias_slope, torch.stack([self.factor, by_map, rest])


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move a BatchNorm's running statistics as it would itself."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.num_batches_tracked is not None:  # None while a checkpointed block is computed again
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)


def batch_norm_of(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d)
    return norm
