"""S0 in training as one autograd function on the kernels: convolution, BatchNorm, GELU, convolution. bf16."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.fast.batch_norm import Moments, batch_norm_of
from coatnet.fast.kernels import (
    BF16,
    Weight,
    WeightSlope,
    bf16_rows,
    groups,
    run,
    run_map,
    scratch,
    sum_of_rows,
)
from coatnet.model.layers import ConvStem


class StemWeights(NamedTuple):
    """What the stem learns; of gradients, the same in the same order."""

    weight1: Tensor
    bias1: Tensor
    norm: Tensor
    norm_bias: Tensor
    weight2: Tensor
    bias2: Tensor

    @classmethod
    def of(cls, stem: ConvStem) -> StemWeights:
        first, norm, _, second = stem
        found: list[Any] = [part for layer in (first, norm, second) for part in (layer.weight, layer.bias)]
        return cls._make(found)

    def rows1(self, depth: int) -> Tensor:
        """The first convolution on unfolded patches of so many values: (D, depth)."""
        rows = self.weight1.permute(0, 2, 3, 1).flatten(1)
        return F.pad(rows, (0, depth - rows.shape[1]))

    @property
    def rows2(self) -> Tensor:
        """The second convolution, lines of taps one after the other: (D, 9 D)."""
        return self.weight2.permute(0, 2, 3, 1).flatten(1)


class Stemmed(torch.autograd.Function):
    """S0 of two convolutions: images (B, C, H, W) float -> (B, D, h, w) bf16. Images get no gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, stem: ConvStem, *weights: Tensor) -> Tensor:
        w = StemWeights(*weights)
        first, norm, _, _ = stem
        with torch.autocast("cpu", enabled=False):
            patches = _unfold(images, first.stride[0])  # pyright: ignore
            B, H, W, _ = patches.shape
            convolved = Weight(w.rows1(patches.shape[3]).T, w.bias1).product(patches)
            moments = Moments(run_map("MOMENTS", convolved), B * H * W, batch_norm_of(norm))
            second, out = Weight(w.rows2.T, w.bias2), torch.empty_like(convolved)
            for group in groups(convolved):
                acted = scratch("group", convolved[group].shape)
                run_map("ACTED", convolved[group], out=acted, **moments.fields)
                padded = _bordered("acted", acted)
                padded[:, 1:-1, 1:-1] = acted
                _convolve(padded, second, out[group])
        ctx.save_for_backward(patches, convolved, *weights)
        ctx.moments = moments
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        patches, convolved, *weights = ctx.saved_tensors
        w, B, width = StemWeights(*weights), len(convolved), convolved.shape[3]
        with torch.autocast("cpu", enabled=False):
            slope = bf16_rows(slope.permute(0, 2, 3, 1))
            back = Weight(w.weight2.flip(2, 3).permute(1, 2, 3, 0).flatten(1).T)
            padded, acted = _bordered("slope", convolved), _bordered("acted", convolved)
            sums, ones = torch.empty(2, B, width), torch.ones(B, width)
            acted_slope = scratch("expanded slope", convolved.shape)
            for group in groups(convolved):
                padded[group, 1:-1, 1:-1] = slope[group]
                _convolve(padded[group], back, acted_slope[group])
                there = scratch("group", convolved[group].shape)
                sums[:, group] = run_map(
                    "ACTED_SLOPE", convolved[group], gradient=acted_slope[group], gates=ones[group],
                    mean_slopes=torch.zeros_like(ones[group]), out=there, **ctx.moments.fields,
                )  # fmt: skip
                acted[group, 1:-1, 1:-1] = there
            weight2_slope = _taps_slope(padded, acted)
            norm_slope, norm_bias_slope, mix = ctx.moments.backward(sums)
            weight1_slope = WeightSlope(width, patches.shape[3])
            for group in groups(convolved):
                mixed = scratch("group", convolved[group].shape)
                run_map("MIXED", convolved[group], gradient=acted_slope[group], mix=mix, out=mixed)
                weight1_slope.add(mixed, patches[group])
            _, channels, side, _ = w.weight1.shape
            taps = weight1_slope.total[:, : side * side * channels].unflatten(1, (side, side, channels))
            slopes = (  # the first bias has none: BatchNorm takes it away again
                taps.permute(0, 3, 1, 2), torch.zeros(width), norm_slope, norm_bias_slope, weight2_slope,
                sum_of_rows(slope),
            )  # fmt: skip
        return None, None, *slopes  # in the order of StemWeights


def _unfold(images: Tensor, stride: int) -> Tensor:
    """Return the 3x3 patches of images (B, C, H, W): (B, h, w, 9 C, made even) bf16."""
    images = images.detach().float()
    B, C, H, W = images.shape
    patches = images.new_empty(B, -(-H // stride), -(-W // stride), 9 * C + C % 2, dtype=torch.bfloat16)
    image, channel, line, cell = (4 * step for step in images.stride())
    run(
        "UNFOLD", out_type=BF16, images=B, lines=patches.shape[1], cells=patches.shape[2], depth=C,
        width=patches.shape[3], in_lines=H, in_cells=W, kernel=3, stride=stride, padding=1, source=images,
        source_image=image, source_channel=channel, source_line=line, source_cell=cell, out=patches,
    )  # fmt: skip
    return patches


def _bordered(name: str, like: Tensor) -> Tensor:
    """Return scratch for maps (B, H + 2, W + 2, C) with a border of zeros."""
    B, H, W, C = like.shape
    made = scratch(name, (B, H + 2, W + 2, C))
    for edge in (made[:, 0], made[:, -1], made[:, :, 0], made[:, :, -1]):
        edge.zero_()
    return made


def _convolve(padded: Tensor, weight: Weight, out: Tensor) -> None:
    """Convolve bordered maps (B, H + 2, W + 2, C) by 3x3 taps into (B, H, W, D)."""
    B, H, W, D = out.shape
    C = padded.shape[3]
    run(
        "PRODUCT", type=BF16, out_type=BF16, images=B, lines=H, cells=W, depth=3 * C, width=D, segments=3,
        segment_stride=2 * C * (W + 2), source_image=2 * C * (W + 2) * (H + 2), source_line=2 * C * (W + 2),
        source_cell=2 * C, out_image=2 * D * H * W, out_line=2 * D * W, out_cell=2 * D, source=padded,
        weight=weight.packed, bias=weight.bias, out=out,
    )  # fmt: skip


def _taps_slope(slope: Tensor, source: Tensor) -> Tensor:
    """Return the gradient of a 3x3 convolution's weight, (D, C, 3, 3), from bordered maps.

    On flat pixels a tap is an offset: what reaches over an edge meets a slope of zero. The three taps of a line lie
    side by side.
    """
    B, H, W, D = slope.shape
    C, found = source.shape[3], list[Tensor]()
    flat_slope, flat_source = slope.flatten(0, 2), source.flatten(0, 2)
    start, cells = W + 1, B * H * W - 2 * (W + 1)
    for line in (-1, 0, 1):
        found.append(torch.empty(D, 3 * C))
        run(
            "WEIGHT_SLOPE", cells=cells, width=D, depth=3 * C, gradient=flat_slope[start:],
            source=flat_source[start + line * W - 1 :], source_cell=2 * C, out=found[-1],
        )  # fmt: skip
    return torch.stack(found, dim=1).unflatten(2, (3, C)).permute(0, 3, 1, 2)
