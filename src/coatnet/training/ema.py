"""An exponential moving average of a network's weights and statistics. Source: Table 10."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """The averaged twin of a network; young averages follow faster: decay = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, num_updates: int) -> None:
        """Move towards the network after its update number `num_updates`, counted from 1."""
        share = 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))
        for mine, theirs in zip(_floats(self.network), _floats(network), strict=True):
            mine.lerp_(theirs, share)


def _floats(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
