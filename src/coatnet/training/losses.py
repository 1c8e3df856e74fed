"""Losses over soft targets, in float32. Source: Table 10, "softmax" and "sigmoid", label smoothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_targets(targets: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Spread each class over a soft row: (B,) int64 -> (B, K) float32, 1 - s + s/K at the class and s/K elsewhere."""
    rows = torch.full((len(targets), num_classes), label_smoothing / num_classes, device=targets.device)
    return rows.scatter_(1, targets[:, None], 1 - label_smoothing + label_smoothing / num_classes)


def loss_of(kind: Literal["softmax", "sigmoid"], logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch, a scalar: logits (B, K), soft targets (B, K).

    "softmax" is cross-entropy; "sigmoid" is binary cross-entropy, summed over the classes.
    """
    logits = logits.float()
    if kind == "softmax":
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()
