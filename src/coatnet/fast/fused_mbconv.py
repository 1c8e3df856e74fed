"""MBConv in training, from its input to its output, on the kernels. bf16.

What lies between the products (BatchNorm, GELU, depthwise convolution, squeeze-excite) is computed line by line, and
computed again on the way back, so that of the wide maps only the two that BatchNorm norms are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coatnet.config import Size
from coatnet.fast.batch_norm import BatchNorms, Moments, Numbers, normed, normed_slope, normed_sums
from coatnet.fast.chain import Link
from coatnet.fast.fused_shortcut import Projection, pools, shorten, shorten_slope
from coatnet.fast.kernels import (
    STRIP,
    GatedWeight,
    Weight,
    WeightSlope,
    floats,
    groups,
    pool_slope,
    run_map,
    scaled,
    sums_for,
    to_be_gated,
    total,
)
from coatnet.fast.operations import Nested, bf16, fp32, run
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

    def as_read(self) -> Weights:
        """Return them as the kernels read them: fp32, of the depthwise one (9, C), of the excitation (S, C)."""
        w = Weights(*floats(self))
        return w._replace(depthwise=w.depthwise.flatten(1).T.contiguous(), excite=w.excite.flatten(1).T.contiguous())

    @property
    def projection(self) -> Projection:
        return Projection(self.project, self.project_bias)


class Gate:
    """Squeeze-excite for maps of so many pixels, from the sums of a kernel over them, (B, parts, 2, C).

    The weights come as `Weights.as_read` gives them.
    """

    def __init__(self, w: Weights, pixels: int) -> None:
        self.squeezed, self.width = w.excite.shape
        self.pixels = pixels
        self.weights = {
            "squeeze": w.reduce, "squeeze_bias": w.reduce_bias, "excite": w.excite, "excite_bias": w.excite_bias,
        }  # fmt: skip

    def _sizes(self, sums: Tensor) -> dict[str, int]:
        images, parts = sums.shape[:2]
        return {
            "images": images, "lines": parts, "cells": self.pixels // parts, "depth": self.width,
            "width": self.squeezed, "stride": 2,
        }  # fmt: skip

    def gates(self, sums: Tensor) -> Tensor:
        """Return the gates, (B, C) float32, from the sums of what they gate."""
        out = fp32(len(sums), self.width)
        run("GATE", sums=sums, out=out, **self._sizes(sums), **self.weights)
        return out

    def backward(self, sums: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates again and what reaches each pixel through them, (B, C) each.

        `sums` are of the gates' gradients and of what they gate. `kept` takes what `gate_slopes` needs, a row an image.
        """
        gates, slopes = fp32(2, len(sums), self.width)
        made = {"made_gates": gates, "made_slopes": slopes, "out": kept}
        run("EXCITE_SLOPE", sums=sums, **made, **self._sizes(sums), **self.weights)
        return gates, slopes

    def room(self, images: int) -> Tensor:
        return fp32(images, 2 * (self.width + self.squeezed))


def gate_slopes(kept: Tensor, w: Weights) -> tuple[Tensor, ...]:
    """Return the gradients of squeeze-excite's weights, in their order, from what `Gate.backward` kept."""
    squeezed, width = w.reduce.shape[:2]
    excited, means, raw, hidden = kept.split([width, width, squeezed, squeezed], dim=1)
    return (
        (raw.T @ means).view_as(w.reduce), raw.sum(dim=0), (excited.T @ hidden).view_as(w.excite), excited.sum(dim=0),
    )  # fmt: skip


class Options(NamedTuple):
    stride: int
    pooled: bool
    numbers: tuple[Numbers, ...]  # of the norms


class Inverted(Link):
    """MBConv. The branch of each image is scaled by (B,) fp32, where that is given.

    Wide maps that only go from one kernel to the next exist for a group of images at a time.
    """

    def __init__(self, block: MBConv, size: Size, images: int, scale_B: Tensor | None) -> None:
        self.size, self.images, self.scale_B = size, images, scale_B
        self.learned = self.weights = Weights.of(block)
        self.norms = BatchNorms(block.norm, block.expand_norm, block.depthwise_norm)
        self.options = Options(block.expand.stride[0], pools(block.shortcut), self.norms.numbers())

    def read(self) -> tuple[Nested, Nested]:
        w = self.weights.as_read()
        shrink = to_be_gated(w.shrink.flatten(1), w.shrink_bias, self.images, self.size[0] * self.size[1])
        return (shrink, tuple(self.norms.running())), (self.scale_B, tuple(w))

    def note_pass(self) -> None:
        self.norms.count_batch()

    @staticmethod
    def there(x: Tensor, alone: Nested, both: Nested, options: Options) -> tuple[Tensor, Nested]:
        (stride, pooled, numbers), (shrink, running), (scale_B, read) = options, alone, both
        w = Weights(*read)
        zeroth = Moments.of(run_map("MOMENTS", x), x[..., 0].numel(), (w.norm, w.norm_bias), running[:2], numbers[0])
        source = normed(x, zeroth, stride)
        B, H, W, _ = source.shape
        expand, width = Weight(w.expand.flatten(1).T), len(w.expand)
        expanded = bf16(B, H, W, width)
        sums = sums_for("MOMENTS", expanded)
        for group in groups(expanded):
            expand.product(source[group], out=expanded[group])
            run_map("MOMENTS", expanded[group], sums=sums[group])
        first = Moments.of(sums, B * H * W, (w.norm1, w.norm1_bias), running[2:4], numbers[1])
        filtered = torch.empty_like(expanded)
        sums = run_map("ACTED_DEPTHWISE", expanded, weight=w.depthwise, out=filtered, **first.fields)
        second = Moments.of(sums, B * H * W, (w.norm2, w.norm2_bias), running[4:], numbers[2])
        past, shortened = shorten(x, w.projection, pooled=pooled)
        gate, gated = Gate(w, H * W), GatedWeight(shrink[0], shrink[1], len(w.shrink))
        out = torch.empty_like(past)
        for group in groups(expanded):
            acted = torch.empty_like(filtered[group])
            gates = gate.gates(run_map("ACTED", filtered[group], out=acted, **second.fields))
            gated.product(acted, gates, out[group], past[group] if scale_B is None else None)
        out = out if scale_B is None else scaled(out, scale_B, past)
        return out, (shortened, source, expanded, filtered, (zeroth.found, first.found, second.found))

    @staticmethod
    def back(slope: Tensor, x: Tensor, kept: Nested, both: Nested, options: Options) -> tuple[Tensor, Nested]:
        (scale_B, read), (shortened, source, expanded, filtered, found) = both, kept
        w = Weights(*read)
        B, H, W, _ = expanded.shape
        pixels = (x[..., 0].numel(), B * H * W, B * H * W)
        zeroth, first, second = (Moments(its, count) for its, count in zip(found, pixels, strict=True))
        past, projection_slopes = shorten_slope(shortened, slope, w.projection)
        slope = slope if scale_B is None else scaled(slope, scale_B)
        acted_slope, sums, gated, shrink_slopes = _through_shrink(w, slope, filtered, second, Gate(w, H * W))
        *norm2_slopes, mix = second.backward(sums)
        expanded_slope, sums, taps_slope = _through_depthwise(w, acted_slope, filtered, mix, expanded, first)
        *norm1_slopes, mix = first.backward(sums)
        source_slope, expand_slope = _through_expand(w, expanded_slope, expanded, mix, source)
        sums = fp32(*source.shape[:2], 2, source.shape[3])
        normed_sums(x, source_slope, options.stride, sums)
        *norm_slopes, mix = zeroth.backward(sums)
        x_slope = torch.empty_like(x)
        for group in groups(x):
            here, around = x[group], past[group]
            if options.pooled:
                around = pool_slope(here, around, torch.empty_like(here))
            normed_slope(here, source_slope[group], options.stride, mix, around, x_slope[group])
        before = (*norm_slopes, expand_slope, *norm1_slopes, taps_slope, *norm2_slopes)
        return x_slope, (before, gated, (*shrink_slopes, *projection_slopes))

    def gradients(self, slopes: Nested) -> Sequence[Tensor | None]:
        before, gated, after = slopes
        found = Weights(*before, *gate_slopes(gated, self.weights), *after)
        found = found._replace(depthwise=found.depthwise.T.contiguous())
        return [
            None if part is None or w is None else part.view_as(w) for part, w in zip(found, self.learned, strict=True)
        ]


def _through_shrink(
    w: Weights, slope: Tensor, filtered: Tensor, second: Moments, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Go back through the last product, squeeze-excite and GELU to what the norm before gives.

    Returns that gradient, its sums, what `gate_slopes` needs, and the product's gradients.
    """
    shrink, shrink_slope = Weight(w.shrink.flatten(1)), WeightSlope(len(w.shrink), filtered.shape[3])
    acted_slope, sums = torch.empty_like(filtered), sums_for("ACTED_SLOPE", filtered)
    kept = gate.room(len(filtered))
    for group in groups(filtered):
        here = {"source": filtered[group], "gradient": shrink.product(slope[group], out=acted_slope[group])}
        gates, pixel_slopes = gate.backward(run_map("GATE_SLOPE", **here, **second.fields), kept[group])
        gated = torch.empty_like(filtered[group])
        run_map(
            "ACTED_SLOPE", **here, gates=gates, mean_slopes=pixel_slopes, out=gated, sums=sums[group], **second.fields
        )
        shrink_slope.add(slope[group], gated)
    return acted_slope, sums, kept, shrink_slope.total()


def _through_depthwise(
    w: Weights, acted_slope: Tensor, filtered: Tensor, mix: Tensor, expanded: Tensor, first: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through BatchNorm, the depthwise convolution and GELU to what the norm before gives.

    Returns that gradient, its sums, and the taps' gradient, (9, C).
    """
    B, H, _, hidden = expanded.shape
    tap_sums, expanded_slope = fp32(B * -(-H // STRIP), 9, hidden), torch.empty_like(expanded)
    sums = run_map(
        "DEPTHWISE_SLOPE", expanded, gradient=acted_slope, residual=filtered, weight=w.depthwise, mix=mix,
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
        mixed = torch.empty_like(expanded[group])
        run_map("MIXED", expanded[group], gradient=expanded_slope[group], mix=mix, out=mixed)
        expand_slope.add(mixed, source[group])
        expand.product(mixed, out=source_slope[group])
    return source_slope, expand_slope.total()[0]
