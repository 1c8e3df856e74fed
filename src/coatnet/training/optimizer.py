"""AdamW, which weights decay, and the rate at each moment. Source: Table 10, appendix A.2."""

from __future__ import annotations

import math

import torch
from torch import nn

from coatnet.config import OptimizerConfig


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters that learn; only weights of convolutions and linear layers decay."""
    decaying = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if id(p) in decaying], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: OptimizerConfig, warmth: float, passed: float) -> float:
    """Return the rate when `warmth` of the warm-up is done and then `passed` of what comes after it, each 0 .. 1.

    Linear from 0 to the peak, then down the schedule.
    """
    if warmth < 1:
        return config.peak_lr * warmth
    if config.schedule == "constant":
        return config.peak_lr
    left = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "cosine" else 1 - passed
    return config.min_lr + (config.peak_lr - config.min_lr) * left


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
