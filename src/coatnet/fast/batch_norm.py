"""BatchNorm in training, between kernels: what it does to a map once the map's moments are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coatnet.fast.operations import run


class Moments:
    """What a BatchNorm in training does to a map, and what its backward mixes.

    `found` (5, C) holds what BATCH_NORM finds over `count` pixels (native/norm_slope.h).
    """

    def __init__(self, found: Tensor, count: int) -> None:
        self.found, self.count = found, count
        self.fields = {"factor": found[0], "shift": found[1]}  # what the kernels ask for that norm a map

    @classmethod
    def of(cls, sums: Tensor, count: int, weight: Tensor, bias: Tensor, eps: float) -> Moments:
        """Find them from a kernel's sums of the map and of its square over `count` pixels, (images, parts, 2, C)."""
        width = sums.shape[-1]
        found = torch.empty(5, width)
        run(
            "BATCH_NORM", images=_num_rows(sums), width=width, cells=count, sums=sums, out=found, scale=weight, bias=bias,
            eps=eps,
        )  # fmt: skip
        return cls(found, count)

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and what mixes slope and map to the map's gradient, (3, C).

        `sums` are of the slope, alone and times the map.
        """
        out = torch.empty_like(self.found)
        run(
            "BATCH_NORM_SLOPE", images=_num_rows(sums), width=sums.shape[-1], cells=self.count, sums=sums,
            source=self.found, out=out,
        )  # fmt: skip
        return out[0], out[1], out[2:]

    @torch.no_grad()
    def follow(self, norm: nn.BatchNorm2d) -> None:
        """Move a BatchNorm's running statistics as it would itself."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        if norm.num_batches_tracked is not None:  # None while a checkpointed block is computed again
            norm.num_batches_tracked.add_(1)
        _, _, mean, _, variance = self.found
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (self.count / max(1, self.count - 1)), norm.momentum)


def normed(x: Tensor, moments: Moments, stride: int) -> Tensor:
    """Norm every `stride`-th pixel of every `stride`-th line: (B, H, W, C) bf16 -> (B, h, w, C)."""
    B, H, W, C = x.shape
    out = x.new_empty(B, -(-H // stride), -(-W // stride), C)
    run("NORMED", source=x, out=out, **_sizes(out, x, stride), **moments.fields)
    return out


def normed_sums(x: Tensor, slope: Tensor, stride: int, sums: Tensor) -> None:
    """Sum the gradient of what `normed` gave by line, alone and times the pixels taken, into (B, h, 2, C)."""
    run("NORMED_SUMS", source=x, gradient=slope, sums=sums, **_sizes(slope, x, stride))


def normed_slope(x: Tensor, slope: Tensor, stride: int, mix: Tensor, past: Tensor, out: Tensor) -> None:
    """Go back through `normed`: the gradient of x plus `past`, which reaches x otherwise, into `out`."""
    run("SPREAD", source=x, gradient=slope, mix=mix, residual=past, out=out, **_sizes(slope, x, stride))


def _sizes(of: Tensor, source: Tensor, stride: int) -> dict[str, int]:
    (B, lines, cells, width), (_, in_lines, in_cells, _) = of.shape, source.shape
    return {
        "images": B, "lines": lines, "cells": cells, "width": width, "in_lines": in_lines, "in_cells": in_cells,
        "stride": stride,
    }  # fmt: skip


def _num_rows(sums: Tensor) -> int:
    return sums.numel() // (2 * sums.shape[-1])


def batch_norm_of(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d)
    return norm
