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


def learning_rate(config: OptimizerConfig, step: int, warmup_share: float, progress: float) -> float:
    """Return the rate of update `step` (from 0), `progress` (0 .. 1) of the run being done.

    Linear from 0 to the peak over `warmup_steps`, the first `warmup_share` of the run, then down the schedule.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.peak_lr
    passed = min(1.0, max(0.0, (progress - warmup_share) / max(1e-9, 1.0 - warmup_share)))
    left = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "cosine" else 1 - passed
    return config.min_lr + (config.peak_lr - config.min_lr) * left


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
