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


def shorten(x: Tensor, projection: Projection, *, pooled: bool) -> tuple[Tensor, Tensor]:
    """Return Proj(Pool(x)) and Pool(x): (B, H, W, C) -> (B, h, w, D) and (B, h, w, C); x where nothing is done."""
    x = pool(x) if pooled else x
    if projection.weight is None:
        return x, x
    return Weight(projection.weight.flatten(1).T, projection.bias).product(x), x


def shorten_slope(x: Tensor, slope: Tensor, projection: Projection) -> tuple[Tensor, Projection]:
    """Go back through the projection of x: return the gradients of x and of its weights; `slope` itself without one."""
    if projection.weight is None:
        return slope, Projection(None, None)
    matrix = projection.weight.flatten(1)
    weight_slope, bias_slope = WeightSlope(*matrix.shape).add(slope, x).total()
    return Weight(matrix).product(slope), Projection(weight_slope.view_as(projection.weight), bias_slope)
