"""MBConv in training, from its input to its output, as one autograd function on the kernels. bf16.

What lies between the products (BatchNorm, GELU, depthwise convolution, squeeze-excite) is computed line by line, and
computed again on the way back, so that of the wide maps only the two that BatchNorm norms are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet.fast.batch_norm import Moments, batch_norm_of, normed, normed_slope, normed_sums
from coatnet.fast.fused_shortcut import Projection, pools, shorten, shorten_slope
from coatnet.fast.kernels import (
    STRIP,
    GatedWeight,
    Weight,
    WeightSlope,
    bf16_rows,
    groups,
    pool_slope,
    run,
    run_map,
    scratch,
    sums_for,
    together,
    total,
)
from coatnet.model.mbconv import MBConv


class Weights(NamedTuple):
    """What MBConv learns; of gradients, the same in the same order."""

    norm: Tensor
    norm_bias: Tensor
    expand: Tensor
    norm1: Tensor
    norm1_bias: Tensor
    depthwise: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    reduce: Tensor
    reduce_bias: Tensor
    excite: Tensor
    excite_bias: Tensor
    shrink: Tensor
    shrink_bias: Tensor
    project: Tensor | None
    project_bias: Tensor | None

    @classmethod
    def of(cls, block: MBConv) -> Weights:
        gate, projection = block.squeeze_excite, Projection.of(block.shortcut)
        found: list[Any] = [block.norm.weight, block.norm.bias, block.expand.weight]
        for layer in (block.expand_norm, block.depthwise, block.depthwise_norm, gate.reduce, gate.expand, block.shrink):
            found += [layer.weight] if layer is block.depthwise else [layer.weight, layer.bias]
        return cls._make([*found, *projection])

    @property
    def taps(self) -> Tensor:
        """The depthwise weights as the kernels read them, (9, C)."""
        return self.depthwise.flatten(1).T.contiguous()

    @property
    def projection(self) -> Projection:
        return Projection(self.project, self.project_bias)


class Gate:
    """Squeeze-excite for maps of so many pixels, from the sums of a kernel over them, (B, parts, 2, C)."""

    def __init__(self, w: Weights, pixels: int) -> None:
        self.squeezed, self.width = w.reduce.shape[:2]
        self.pixels = pixels
        self.weights = {
            "squeeze": w.reduce.detach().float(), "squeeze_bias": w.reduce_bias.detach().float(),
            "excite": w.excite.detach().float().flatten(1).T.contiguous(),
            "excite_bias": w.excite_bias.detach().float(),
        }  # fmt: skip

    def _sizes(self, sums: Tensor) -> dict[str, int]:
        images, parts = sums.shape[:2]
        return {
            "images": images, "lines": parts, "cells": self.pixels // parts, "depth": self.width,
            "width": self.squeezed, "stride": 2,
        }  # fmt: skip

    def gates(self, sums: Tensor) -> Tensor:
        """Return the gates, (B, C) float32, from the sums of what they gate."""
        out = torch.empty(len(sums), self.width)
        run("GATE", sums=sums, out=out, **self._sizes(sums), **self.weights)
        return out

    def backward(self, sums: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates again and what reaches each pixel through them, (B, C) each.

        `sums` are of the gates' gradients and of what they gate. `kept` takes what `slopes` needs, a row an image.
        """
        gates, slopes = torch.empty(2, len(sums), self.width)
        made = {"made_gates": gates, "made_slopes": slopes, "out": kept}
        run("EXCITE_SLOPE", sums=sums, **made, **self._sizes(sums), **self.weights)
        return gates, slopes

    def room(self, images: int) -> Tensor:
        return torch.empty(images, 2 * (self.width + self.squeezed))

    def slopes(self, kept: Tensor, w: Weights) -> tuple[Tensor, ...]:
        """Return the gradients of the weights, in their order."""
        excited, means, raw, squeezed = kept.split([self.width, self.width, self.squeezed, self.squeezed], dim=1)
        return (
            (raw.T @ means).view_as(w.reduce), raw.sum(dim=0), (excited.T @ squeezed).view_as(w.excite),
            excited.sum(dim=0),
        )  # fmt: skip


class Inverted(torch.autograd.Function):
    """MBConv: (B, C, H, W) -> (B, D, h, w) bf16. The branch of each image is scaled by (B), where that is given.

    Wide maps that only go from one kernel to the next exist for a group of images at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MBConv, scale_B: Tensor | None, *weights: Tensor) -> Tensor:
        w, stride, pooled = Weights(*weights), block.expand.stride[0], pools(block.shortcut)
        norms = [batch_norm_of(norm) for norm in (block.norm, block.expand_norm, block.depthwise_norm)]
        x_rows = bf16_rows(x.permute(0, 2, 3, 1))
        with together():
            zeroth = Moments(run_map("MOMENTS", x_rows), x_rows[..., 0].numel(), norms[0])
            source = normed(x_rows, zeroth, stride)
            B, H, W, _ = source.shape
            expand, hidden = Weight(w.expand.flatten(1).T), w.expand.shape[0]
            expanded = source.new_empty(B, H, W, hidden)
            sums = sums_for("MOMENTS", expanded)
            for group in groups(expanded):
                expand.product(source[group], out=expanded[group])
                run_map("MOMENTS", expanded[group], sums=sums[group])
            first = Moments(sums, B * H * W, norms[1])
            filtered = torch.empty_like(expanded)
            sums = run_map("ACTED_DEPTHWISE", expanded, weight=w.taps, out=filtered, **first.fields)
            second = Moments(sums, B * H * W, norms[2])
            past = shorten(x_rows, w.projection, pooled=pooled)
            gate, shrink = Gate(w, H * W), GatedWeight(w.shrink.flatten(1), w.shrink_bias, images=B, pixels=H * W)
            out = torch.empty_like(past)
            for group in groups(expanded):
                acted = scratch("group", filtered[group].shape)
                gates = gate.gates(run_map("ACTED", filtered[group], out=acted, **second.fields))
                shrink.product(acted, gates, out[group], past[group] if scale_B is None else None)
        if scale_B is not None:
            out = past + out * scale_B
        for moments, norm in zip((zeroth, first, second), norms, strict=True):
            moments.follow(norm)
        ctx.save_for_backward(x_rows, source, expanded, filtered, scale_B, *weights)
        ctx.moments, ctx.stride, ctx.pooled, ctx.in_dtype = (zeroth, first, second), stride, pooled, x.dtype
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_rows, source, expanded, filtered, scale_B, *weights = ctx.saved_tensors
        w, (zeroth, first, second) = Weights(*weights), ctx.moments
        _, H, W, _ = expanded.shape
        whole_slope = slope = bf16_rows(slope.permute(0, 2, 3, 1))
        if scale_B is not None:
            slope = whole_slope * scale_B
        with together():
            past, projection_slopes = shorten_slope(x_rows, whole_slope, w.projection, pooled=ctx.pooled)
            gate = Gate(w, H * W)
            acted_slope, sums, kept, shrink_slopes = _through_shrink(w, slope, filtered, second, gate)
            *norm2_slopes, mix = second.backward(sums)
            expanded_slope, sums, taps_slope = _through_depthwise(w, acted_slope, filtered, mix, expanded, first)
            *norm1_slopes, mix = first.backward(sums)
            source_slope, expand_slope = _through_expand(w, expanded_slope, expanded, mix, source)
            sums = torch.empty(*source.shape[:2], 2, source.shape[3])
            normed_sums(x_rows, source_slope, ctx.stride, sums)
            *norm_slopes, mix = zeroth.backward(sums)
            x_slope = torch.empty_like(x_rows)
            for group in groups(x_rows):
                here, around = x_rows[group], past[group]
                if ctx.pooled:
                    around = pool_slope(here, around, scratch("group", here.shape))
                normed_slope(here, source_slope[group], ctx.stride, mix, around, x_slope[group])
        slopes = (
            *norm_slopes, expand_slope.view_as(w.expand), *norm1_slopes, taps_slope.T.reshape(w.depthwise.shape),
            *norm2_slopes, *gate.slopes(kept, w), shrink_slopes[0].view_as(w.shrink), shrink_slopes[1],
            *projection_slopes,
        )  # fmt: skip
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, None, *slopes  # in the order of Weights


def _through_shrink(
    w: Weights, slope: Tensor, filtered: Tensor, second: Moments, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Go back through the last product, squeeze-excite and GELU to what the norm before gives.

    Returns that gradient, which lies in scratch, its sums, what `Gate.slopes` needs, and the product's gradients.
    """
    shrink, shrink_slope = Weight(w.shrink.flatten(1)), WeightSlope(len(w.shrink), filtered.shape[3])
    acted_slope, sums = scratch("slope", filtered.shape), sums_for("ACTED_SLOPE", filtered)
    kept = gate.room(len(filtered))
    for group in groups(filtered):
        here = {"source": filtered[group], "gradient": shrink.product(slope[group], out=acted_slope[group])}
        gates, pixel_slopes = gate.backward(run_map("GATE_SLOPE", **here, **second.fields), kept[group])
        gated = scratch("group", filtered[group].shape)
        run_map(
            "ACTED_SLOPE", **here, gates=gates, mean_slopes=pixel_slopes, out=gated, sums=sums[group], **second.fields
        )
        shrink_slope.add(slope[group], gated)
    return acted_slope, sums, kept, shrink_slope.total()


def _through_depthwise(
    w: Weights, acted_slope: Tensor, filtered: Tensor, mix: Tensor, expanded: Tensor, first: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through BatchNorm, the depthwise convolution and GELU to what the norm before gives.

    Returns that gradient, which lies in scratch, its sums, and the taps' gradient, (9, C).
    """
    B, H, _, hidden = expanded.shape
    tap_sums, expanded_slope = torch.empty(B * -(-H // STRIP), 9, hidden), scratch("expanded slope", expanded.shape)
    sums = run_map(
        "DEPTHWISE_SLOPE", expanded, gradient=acted_slope, residual=filtered, weight=w.taps, mix=mix,
        weight_sums=tap_sums, out=expanded_slope, **first.fields,
    )  # fmt: skip
    return expanded_slope, sums, total(tap_sums)


def _through_expand(
    w: Weights, expanded_slope: Tensor, expanded: Tensor, mix: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back through BatchNorm and the first product: return the gradients of its source and of its weight."""
    expand, expand_slope = Weight(w.expand.flatten(1)), WeightSlope(expanded.shape[3], source.shape[3])
    source_slope = torch.empty_like(source)
    for group in groups(expanded):
        mixed = scratch("group", expanded[group].shape)
        run_map("MIXED", expanded[group], gradient=expanded_slope[group], mix=mix, out=mixed)
        expand_slope.add(mixed, source[group])
        expand.product(mixed, out=source_slope[group])
    return source_slope, expand_slope.total()[0]
