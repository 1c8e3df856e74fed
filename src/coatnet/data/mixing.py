"""Mixup and CutMix between neighbours in the shuffled order, on the device, after normalising.

Source: Zhang et al., arXiv 1710.09412 (mixup); Yun et al., arXiv 1905.04899 (CutMix).
Departs: the partner of the picture at position p is the one at p ^ 1, where the papers permute the batch; neighbours of
a shuffled order are as random, and are together whatever the number of ranks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from coatnet.data import draws


def mix(
    images: Tensor,
    targets: Tensor,
    positions: Tensor,
    *,
    seed: int,
    mixup_alpha: float | None,
    cutmix_alpha: float | None,
) -> tuple[Tensor, Tensor]:
    """Mix each picture and its soft target with its neighbour's; where both kinds are on, each pair draws one.

    images (B, C, H, W) float, targets (B, K) float, positions (B,) int64 in a row -> images, targets, as they came

    One whose neighbour is not in the batch stays as it is: give whole shares of even size, or even microbatches.
    """
    if mixup_alpha is None and cutmix_alpha is None:
        return images, targets
    places = positions.cpu().numpy()
    partners = _partners(places)
    size = (images.shape[2], images.shape[3])
    plans = {pair: _draw(seed, pair, mixup_alpha, cutmix_alpha, size) for pair in np.unique(places // 2).tolist()}
    chosen = [plans[pair] for pair in (places // 2).tolist()]
    kept_B = np.array([kept for kept, _ in chosen], dtype=np.float32)
    boxes_B4 = np.array([box for _, box in chosen])
    partner = torch.from_numpy(partners).to(images.device)
    kept = torch.from_numpy(kept_B).to(images.device)
    weight = _weights(kept, torch.from_numpy(boxes_B4).to(images.device), size)
    return (
        torch.lerp(images[partner], images, weight.to(images.dtype)),
        torch.lerp(targets[partner], targets, kept[:, None].to(targets.dtype)),
    )


def _partners(places: draws.IntArray) -> draws.IntArray:
    """Return the row of each picture's neighbour, or its own where that is not in the batch: (B,) int64."""
    rows = np.arange(len(places))
    partners = rows + ((places ^ 1) - places)
    return np.where((partners >= 0) & (partners < len(places)), partners, rows)


def _draw(
    seed: int, pair: int, mixup_alpha: float | None, cutmix_alpha: float | None, size: tuple[int, int]
) -> tuple[float, tuple[int, int, int, int]]:
    """Draw the share a pair keeps of its own, and the box (top, bottom, left, right; all 0 for mixup) it exchanges."""
    H, W = size
    rng = draws.generator(seed, "mix", 0, pair)  # positions never repeat, so the pair says the epoch
    cut = mixup_alpha is None or (cutmix_alpha is not None and rng.random() < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    assert alpha is not None
    kept = rng.beta(alpha, alpha)
    if not cut:
        return kept, (0, 0, 0, 0)
    half_h, half_w = H * math.sqrt(1 - kept) / 2, W * math.sqrt(1 - kept) / 2
    y, x = rng.random() * H, rng.random() * W
    top, bottom = max(0, round(y - half_h)), min(H, round(y + half_h))
    left, right = max(0, round(x - half_w)), min(W, round(x + half_w))
    return 1 - (bottom - top) * (right - left) / (H * W), (top, bottom, left, right)


def _weights(kept_B: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return how much of its own each pixel keeps: (B, 1, H, W); 0 or 1 where a box is exchanged, else the share."""
    y = torch.arange(size[0], device=kept_B.device)[:, None]
    x = torch.arange(size[1], device=kept_B.device)[None, :]
    top, bottom, left, right = boxes_B4[:, :, None, None].unbind(1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    cut = (boxes_B4.sum(1) > 0)[:, None, None]
    return torch.where(cut, (~inside).float(), kept_B[:, None, None])[:, None]
