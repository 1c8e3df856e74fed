"""A block's shortcut in training, Proj(Pool(x)), on the kernels. bf16."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from coatnet.fast.kernels import Weight, WeightSlope, pool
from coatnet.model.layers import Pool


class Projection(NamedTuple):
    """What a shortcut learns, where it widens; of gradients, the same."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, shortcut: nn.Module) -> Projection:
        found: list[Any] = [part for part in shortcut.children() if isinstance(part, nn.Conv2d)]
        return cls(found[0].weight, found[0].bias) if found else cls(None, None)


def pools(shortcut: nn.Module) -> bool:
    return any(isinstance(part, Pool) for part in shortcut.children())


def shorten(x: Tensor, projection: Projection, *, pooled: bool) -> Tensor:
    """Return Proj(Pool(x)): (B, H, W, C) -> (B, h, w, D); x itself where there is nothing to do."""
    x = pool(x) if pooled else x
    if projection.weight is None:
        return x
    return Weight(projection.weight.flatten(1).T, projection.bias).product(x)


def shorten_slope(x: Tensor, slope: Tensor, projection: Projection, *, pooled: bool) -> tuple[Tensor, Projection]:
    """Go back through the projection: return the gradient of what it took, and its own; `slope` itself without one."""
    if projection.weight is None:
        return slope, Projection(None, None)
    matrix = projection.weight.flatten(1)
    weight_slope, bias_slope = WeightSlope(*matrix.shape).add(slope, pool(x) if pooled else x).total()
    return Weight(matrix).product(slope), Projection(weight_slope.view_as(projection.weight), bias_slope)
