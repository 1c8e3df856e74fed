"""BatchNorm in training, between kernels: what it does to a map once the map's moments are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.fast.operations import fp32, run

Numbers = tuple[float, float]  # eps and momentum


class Moments:
    """What a BatchNorm in training does to a map, and what its backward mixes.

    `found` (4, C) holds what BATCH_NORM finds over `count` pixels (native/norm_slope.h).
    """

    def __init__(self, found: Tensor, count: int) -> None:
        self.found, self.count = found, count
        self.fields = {"factor": found[0], "shift": found[1]}  # what the kernels ask for that norm a map

    @classmethod
    def of(
        cls, sums: Tensor, count: int, affine: Sequence[Tensor], running: Sequence[Tensor], numbers: Numbers
    ) -> Moments:
        """Find them from a kernel's sums of the map and of its square over `count` pixels, (images, parts, 2, C).

        Moves the running mean and variance on.
        """
        width, (weight, bias), (mean, variance), (eps, momentum) = sums.shape[-1], affine, running, numbers
        found = fp32(4, width)
        run(
            "BATCH_NORM", images=_num_rows(sums), width=width, cells=count, sums=sums, out=found, scale=weight,
            bias=bias, running_mean=mean, running_variance=variance, eps=eps, momentum=momentum,
        )  # fmt: skip
        return cls(found, count)

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and what mixes slope and map to the map's gradient, (3, C).

        `sums` are of the slope, alone and times the map.
        """
        out = fp32(5, sums.shape[-1])
        run(
            "BATCH_NORM_SLOPE", images=_num_rows(sums), width=sums.shape[-1], cells=self.count, sums=sums,
            source=self.found, out=out,
        )  # fmt: skip
        return out[0], out[1], out[2:]


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


def gathers(norm: nn.Module) -> bool:
    """Whether this is a BatchNorm that norms by the batch and moves statistics in fp32 on, as the kernels do."""
    if not isinstance(norm, nn.BatchNorm2d):
        return False
    running = (norm.running_mean, norm.running_var)
    are_plain = all(part is not None and part.dtype == torch.float32 and part.is_contiguous() for part in running)
    return norm.training and are_plain and norm.momentum is not None


class BatchNorms:
    """The BatchNorms of a block, for functions that are recorded; each one `gathers`."""

    def __init__(self, *norms: Any) -> None:
        self.norms: list[Any] = [*norms]

    def running(self) -> list[Tensor]:
        """Return their running means and variances, in turns."""
        return [part for norm in self.norms for part in (norm.running_mean, norm.running_var)]

    def numbers(self) -> tuple[Numbers, ...]:
        return tuple((norm.eps, norm.momentum) for norm in self.norms)

    def count_batch(self) -> None:
        for norm in self.norms:
            if norm.num_batches_tracked is not None:  # None while a checkpointed block is computed again
                norm.num_batches_tracked.add_(1)
