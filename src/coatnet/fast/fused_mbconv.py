"""MBConv in training, from its first product to its last, as one autograd function on the kernels. bf16.

What lies between the products (BatchNorm, GELU, depthwise convolution, squeeze-excite) is computed line by line, and
computed again on the way back, so that of the wide maps only the two that BatchNorm norms are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coatnet.fast.batch_norm import Moments, batch_norm_of
from coatnet.fast.kernels import (
    STRIP,
    GatedWeight,
    Weight,
    WeightSlope,
    bf16_rows,
    groups,
    run_map,
    scratch,
    sum_of_rows,
)
from coatnet.model.mbconv import MBConv


def _gates(mean: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor) -> Tensor:
    """Return squeeze-excite's gates: means (B, C) -> (B, C), float32."""
    return F.linear(F.silu(F.linear(mean, reduce.flatten(1), reduce_bias)), expand.flatten(1), expand_bias).sigmoid()


class Weights(NamedTuple):
    """What MBConv's branch learns after its first norm; of gradients, the same in the same order."""

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

    @classmethod
    def of(cls, block: MBConv) -> Weights:
        gate = block.squeeze_excite
        layers = (block.expand_norm, block.depthwise, block.depthwise_norm, gate.reduce, gate.expand, block.shrink)
        found: list[Any] = [block.expand.weight]
        for layer in layers:
            found += [layer.weight] if layer is block.depthwise else [layer.weight, layer.bias]
        return cls._make(found)

    @property
    def gate(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.reduce, self.reduce_bias, self.excite, self.excite_bias

    @property
    def taps(self) -> Tensor:
        """The depthwise weights as the kernels read them, (9, C)."""
        return self.depthwise.flatten(1).T.contiguous()


class Inverted(torch.autograd.Function):
    """MBConv's branch after its first norm: (B, C, H, W) -> (B, D, h, w) bf16.

    Wide maps that only go from one kernel to the next exist for a group of images at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MBConv, *weights: Tensor) -> Tensor:
        w, stride = Weights(*weights), block.expand.stride[0]
        with torch.autocast("cpu", enabled=False):
            source = bf16_rows(x.permute(0, 2, 3, 1)[:, ::stride, ::stride])
            B, H, W, _ = source.shape
            expand, hidden = Weight(w.expand.flatten(1).T), w.expand.shape[0]
            expanded, sums = source.new_empty(B, H, W, hidden), torch.empty(2, B, hidden)
            for group in groups(expanded):
                expand.product(source[group], out=expanded[group])
                sums[:, group] = run_map("MOMENTS", expanded[group])
            first = Moments(sums, B * H * W, batch_norm_of(block.expand_norm))
            filtered = torch.empty_like(expanded)
            sums = run_map("ACTED_DEPTHWISE", expanded, weight=w.taps, out=filtered, **first.fields)
            second = Moments(sums, B * H * W, batch_norm_of(block.depthwise_norm))
            shrink = GatedWeight(w.shrink.flatten(1), w.shrink_bias, pixels=H * W)
            out, mean, gates = source.new_empty(B, H, W, shrink.width), torch.empty(B, hidden), torch.empty(B, hidden)
            for group in groups(expanded):
                acted = scratch("group", filtered[group].shape)
                mean[group] = run_map("ACTED", filtered[group], out=acted, **second.fields)[0] / (H * W)
                gates[group] = _gates(mean[group], *w.gate)
                shrink.product(acted, gates[group], out[group])
        ctx.save_for_backward(source, expanded, filtered, mean, gates, *weights)
        ctx.first, ctx.second, ctx.stride, ctx.in_shape, ctx.in_dtype = first, second, stride, x.shape, x.dtype
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, expanded, filtered, mean, gates, *weights = ctx.saved_tensors
        w, first, second = Weights(*weights), ctx.first, ctx.second
        B, H, W, hidden = expanded.shape
        with torch.autocast("cpu", enabled=False):
            slope = bf16_rows(slope.permute(0, 2, 3, 1))
            shrink, shrink_slope = Weight(w.shrink.flatten(1)), WeightSlope(w.shrink.shape[0], hidden)
            acted_slope, sums, gate_slopes = scratch("slope", filtered.shape), torch.empty(2, B, hidden), []
            for group in groups(expanded):
                here = {"source": filtered[group], "gradient": shrink.product(slope[group], out=acted_slope[group])}
                by_gates = run_map("GATE_SLOPE", **here, **second.fields)[0]
                mean_slope, *found = _gate_slopes(mean[group], w, by_gates)
                gate_slopes.append(found)
                gated = scratch("group", filtered[group].shape)
                sums[:, group] = run_map(
                    "ACTED_SLOPE", **here, gates=gates[group], mean_slopes=(mean_slope / (H * W)).contiguous(),
                    out=gated, **second.fields,
                )  # fmt: skip
                shrink_slope.add(slope[group], gated)
            norm2_slope, norm2_bias_slope, mix = second.backward(sums)
            tap_sums = torch.empty(B * -(-H // STRIP), 9, hidden)
            expanded_slope = scratch("expanded slope", expanded.shape)
            sums = run_map(
                "DEPTHWISE_SLOPE", expanded, gradient=acted_slope, residual=filtered, weight=w.taps, mix=mix,
                weight_sums=tap_sums, out=expanded_slope, **first.fields,
            )  # fmt: skip
            norm1_slope, norm1_bias_slope, mix = first.backward(sums)
            expand, expand_slope = Weight(w.expand.flatten(1)), WeightSlope(hidden, source.shape[3])
            source_slope = torch.empty_like(source)
            for group in groups(expanded):
                mixed = scratch("group", expanded[group].shape)
                run_map("MIXED", expanded[group], gradient=expanded_slope[group], mix=mix, out=mixed)
                expand_slope.add(mixed, source[group])
                expand.product(mixed, out=source_slope[group])
            slopes = (
                expand_slope.total.reshape(w.expand.shape), norm1_slope, norm1_bias_slope,
                tap_sums.sum(dim=0).T.reshape(w.depthwise.shape), norm2_slope, norm2_bias_slope,
                *(torch.stack(parts).sum(dim=0) for parts in zip(*gate_slopes, strict=True)),
                shrink_slope.total.reshape(w.shrink.shape), sum_of_rows(slope),
            )  # fmt: skip
            x_slope = _spread(source_slope, ctx.stride, ctx.in_shape).permute(0, 3, 1, 2).to(ctx.in_dtype)
        return x_slope, None, *slopes  # in the order of Weights


def _gate_slopes(mean: Tensor, w: Weights, slope: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the means and of squeeze-excite's weights, given that of the gates (B, C)."""
    with torch.enable_grad():
        inputs = [part.detach().requires_grad_() for part in (mean, *w.gate)]
        return torch.autograd.grad(_gates(*inputs), inputs, slope)


def _spread(slope: Tensor, stride: int, shape: torch.Size) -> Tensor:
    """Put the gradient of every stride-th pixel back into its place: (B, h, w, C) -> (B, H, W, C)."""
    if stride == 1:
        return slope
    B, C, H, W = shape
    out = slope.new_zeros(B, H, W, C)
    out[:, ::stride, ::stride] = slope
    return out
