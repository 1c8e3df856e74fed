"""Weights that leave no term at zero or one, so that a term that is missing or misplaced shows."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and statistic a random value of a size that keeps activations near 1."""
    rng = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64) * std

    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            parameter.copy_(normal(parameter.shape, 1.0))
        elif parameter.dim() > 1:
            parameter.copy_(normal(parameter.shape, (parameter[0].numel()) ** -0.5))
        elif name.endswith("bias"):
            parameter.copy_(normal(parameter.shape, 0.2))
        else:
            parameter.copy_(1 + normal(parameter.shape, 0.2))
    for name, statistic in model.named_buffers():
        if name.endswith("running_mean"):
            statistic.copy_(normal(statistic.shape, 0.3))
        elif name.endswith("running_var"):
            statistic.copy_(0.5 + torch.rand(statistic.shape, generator=rng, dtype=torch.float64))
