"""The network's form for training on a processor: the same blocks, with fewer passes over memory.

MBConv from its first product to its last, and the FFN, are one autograd function each. What lies between their products
(BatchNorm, GELU, depthwise convolution, squeeze-excite) is computed by `native/training.h` line by line, and computed
again on the way back, so that of the wide maps only the two that BatchNorm norms are kept. In bf16, where autocast asks
for it; everything else, and every other machine, takes the readable blocks as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coatnet import native
from coatnet.config import Size
from coatnet.fast.kernels import GatedWeight, Weight, WeightSlope, bf16_rows, groups, run, run_map, scratch, sum_of_rows
from coatnet.fast.packing import bias_by_offset
from coatnet.model.attention import Attention, FeedForward
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet

STRIP = 14  # lines (native/training.h)
HEAD_DIM = 32  # of the heads that the kernels know the way back through (native/attention_slope.h)


def for_training(network: CoAtNet) -> CoAtNet:
    """Give the network's blocks, in place, their fused class where the kernels can run; weights and names stay.

    The fused blocks are used while BatchNorm gathers statistics under bf16 autocast on a processor, and only then.
    """
    if native.missing("bf16") is None:
        for module in network.modules():
            if type(module) is MBConv and _fits(module):
                module.__class__ = _FusedMBConv  # what a copy or a checkpoint sees is the same module
            elif type(module) is Attention and _fits_attention(module):
                module.__class__ = _FusedAttention
            elif type(module) is FeedForward and module[0].weight.shape[1] % 4 == 0:  # pyright: ignore
                module.__class__ = _FusedFeedForward
    return network


def _fits_attention(attention: Attention) -> bool:
    width = attention.project.in_features
    return (
        attention.weigh.relative != "post"
        and width // attention.num_heads == HEAD_DIM
        and attention.qkv.in_features % 4 == 0
    )


def _fits(block: MBConv) -> bool:
    norms = (block.norm, block.expand_norm, block.depthwise_norm)
    widths = (block.expand.in_channels, block.shrink.out_channels)
    return (
        all(type(norm) is nn.BatchNorm2d for norm in norms)
        and block.depthwise.stride[0] == 1
        and not any(width % 4 for width in widths)
    )


def _is_wanted(x: Tensor) -> bool:
    """Whether this is training in bf16 on a processor, uncompiled."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class _FusedMBConv(MBConv):
    def forward(self, x: Tensor, draws_B1: Tensor | None = None) -> Tensor:
        if not (_is_wanted(x) and self.expand_norm.training and self.depthwise_norm.training):
            return super().forward(x, draws_B1)
        branch = _Inverted.apply(self.norm(x), self, *_Weights.of(self))
        return self.shortcut(x) + self.drop(branch, None if draws_B1 is None else draws_B1[:, 0])


class _FusedFeedForward(FeedForward):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Sequential gives it)
        if not _is_wanted(input):
            return super().forward(input)
        first, _, second = self
        return _Fed.apply(input, first.weight, first.bias, second.weight, second.bias)


class _FusedAttention(Attention):
    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        if not _is_wanted(x_BNC):
            return super().forward(x_BNC, grid)
        bias = None if self.weigh.bias is None else bias_by_offset(self.weigh.bias.table, grid)
        qkv = _Linear.apply(x_BNC, self.qkv.weight, self.qkv.bias)
        mixed = _Attended.apply(qkv, bias, self.num_heads, grid)
        return _Linear.apply(mixed, self.project.weight, self.project.bias)


class _Moments:
    """What a BatchNorm in training does to a map, and what its backward mixes."""

    def __init__(self, sums: Tensor, count: int, norm: nn.BatchNorm2d) -> None:
        total, squares = sums.double().sum(dim=1) / count
        variance = (squares - total.square()).clamp(min=0)
        self.count, self.mean, self.inverse = count, total.float(), (variance + norm.eps).rsqrt().float()
        self.weight = norm.weight.detach()
        self.factor = self.weight * self.inverse
        self.shift = norm.bias.detach() - self.mean * self.factor
        _follow(norm, self.mean, variance.float() * (count / max(1, count - 1)))

    @property
    def fields(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "shift": self.shift}

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and what mixes slope and map to the map's gradient, (3, C)."""
        bias_slope, with_map = sums.sum(dim=1)
        weight_slope = self.inverse * (with_map - self.mean * bias_slope)
        by_map = -self.factor * self.inverse * weight_slope / self.count
        rest = -self.factor * bias_slope / self.count - by_map * self.mean
        return weight_slope, bias_slope, torch.stack([self.factor, by_map, rest])


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move a BatchNorm's running statistics as it would itself."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.num_batches_tracked is not None:  # None while a checkpointed block is computed again
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)


def _batch_norm(norm: nn.Module) -> nn.BatchNorm2d:
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def _gates(mean: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor) -> Tensor:
    """Return squeeze-excite's gates: means (B, C) -> (B, C), float32."""
    return F.linear(F.silu(F.linear(mean, reduce.flatten(1), reduce_bias)), expand.flatten(1), expand_bias).sigmoid()


class _Weights(NamedTuple):
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
    def of(cls, block: MBConv) -> _Weights:
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


class _Inverted(torch.autograd.Function):
    """MBConv's branch after its first norm: (B, C, H, W) -> (B, D, h, w) bf16.

    Wide maps that only go from one kernel to the next exist for a group of images at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MBConv, *weights: Tensor) -> Tensor:
        w, stride = _Weights(*weights), block.expand.stride[0]
        with torch.autocast("cpu", enabled=False):
            source = bf16_rows(x.permute(0, 2, 3, 1)[:, ::stride, ::stride])
            B, H, W, _ = source.shape
            expand, hidden = Weight(w.expand.flatten(1).T), w.expand.shape[0]
            expanded, sums = source.new_empty(B, H, W, hidden), torch.empty(2, B, hidden)
            for group in groups(expanded):
                expand.product(source[group], out=expanded[group])
                sums[:, group] = run_map("MOMENTS", expanded[group])
            first = _Moments(sums, B * H * W, _batch_norm(block.expand_norm))
            filtered = torch.empty_like(expanded)
            sums = run_map("ACTED_DEPTHWISE", expanded, weight=w.taps, out=filtered, **first.fields)
            second = _Moments(sums, B * H * W, _batch_norm(block.depthwise_norm))
            shrink = GatedWeight(w.shrink.flatten(1), w.shrink_bias)
            out, mean, gates = source.new_empty(B, H, W, shrink.width), torch.empty(B, hidden), torch.empty(B, hidden)
            for group in groups(expanded):
                acted = scratch("group", filtered[group])
                mean[group] = run_map("ACTED", filtered[group], out=acted, **second.fields)[0] / (H * W)
                gates[group] = _gates(mean[group], *w.gate)
                shrink.product(acted, gates[group], out[group])
        ctx.save_for_backward(source, expanded, filtered, mean, gates, *weights)
        ctx.first, ctx.second, ctx.stride, ctx.in_shape, ctx.in_dtype = first, second, stride, x.shape, x.dtype
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, expanded, filtered, mean, gates, *weights = ctx.saved_tensors
        w, first, second = _Weights(*weights), ctx.first, ctx.second
        B, H, W, hidden = expanded.shape
        with torch.autocast("cpu", enabled=False):
            slope = bf16_rows(slope.permute(0, 2, 3, 1))
            shrink, shrink_slope = Weight(w.shrink.flatten(1)), WeightSlope(w.shrink.shape[0], hidden)
            acted_slope, sums, gate_slopes = scratch("slope", filtered), torch.empty(2, B, hidden), []
            for group in groups(expanded):
                here = {"source": filtered[group], "gradient": shrink.product(slope[group], out=acted_slope[group])}
                by_gates = run_map("GATE_SLOPE", **here, **second.fields)[0]
                mean_slope, *found = _gate_slopes(mean[group], w, by_gates)
                gate_slopes.append(found)
                gated = scratch("group", filtered[group])
                sums[:, group] = run_map(
                    "ACTED_SLOPE", **here, gates=gates[group], mean_slopes=(mean_slope / (H * W)).contiguous(),
                    out=gated, **second.fields,
                )  # fmt: skip
                shrink_slope.add(slope[group], gated)
            norm2_slope, norm2_bias_slope, mix = second.backward(sums)
            tap_sums, expanded_slope = torch.empty(B * -(-H // STRIP), 9, hidden), scratch("expanded slope", expanded)
            sums = run_map(
                "DEPTHWISE_SLOPE", expanded, gradient=acted_slope, residual=filtered, weight=w.taps, mix=mix,
                weight_sums=tap_sums, out=expanded_slope, **first.fields,
            )  # fmt: skip
            norm1_slope, norm1_bias_slope, mix = first.backward(sums)
            expand, expand_slope = Weight(w.expand.flatten(1)), WeightSlope(hidden, source.shape[3])
            source_slope = torch.empty_like(source)
            for group in groups(expanded):
                mixed = scratch("group", expanded[group])
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
        return x_slope, None, *slopes  # in the order of _Weights


def _gate_slopes(mean: Tensor, w: _Weights, slope: Tensor) -> tuple[Tensor, ...]:
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


class _Attended(torch.autograd.Function):
    """softmax(q k / sqrt(D) + bias) v: queries, keys and values (B, N, 3C) -> (B, N, C) bf16. No weights are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, num_heads: int, grid: Size) -> Tensor:
        B, N, width = qkv.shape
        qkv, out = bf16_rows(qkv), qkv.new_empty(B, N, width // 3, dtype=torch.bfloat16)
        ctx.fields = {
            "type": native.TYPES["BF16"], "out_type": native.TYPES["BF16"], "images": B, "lines": grid[0],
            "cells": grid[1], "width": width // 3, "heads": num_heads, "head_dim": HEAD_DIM,
            "relative": native.RELATIVES["NONE" if bias is None else "PRE"],
        }  # fmt: skip
        bias = None if bias is None else bias.contiguous()
        run("ATTENTION", source=qkv, bias=0 if bias is None else bias, out=out, **ctx.fields)
        ctx.save_for_backward(qkv, bias, out)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, bias, out = ctx.saved_tensors
        slope, qkv_slope = bf16_rows(slope), torch.empty_like(qkv)
        bias_slope = None if bias is None else torch.zeros_like(bias)
        run(
            "ATTENTION_SLOPE", source=qkv, bias=0 if bias is None else bias, residual=out, gradient=slope,
            weight_sums=0 if bias_slope is None else bias_slope, out=qkv_slope, **ctx.fields,
        )  # fmt: skip
        return qkv_slope, bias_slope, None, None


class _Fed(torch.autograd.Function):
    """The FFN: tokens (B, N, C) -> the same, bf16. Of the hidden map what comes before GELU is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            source = bf16_rows(x)
            hidden = Weight(weight1.T).product(source)
            acted, ones = scratch("group", hidden), torch.ones(hidden.shape[-1])
            run_map("ACTED", hidden[:, None], factor=ones, shift=bias1.detach(), out=acted)
            out = Weight(weight2.T, bias2).product(acted)
        ctx.save_for_backward(source, hidden, weight1, bias1, weight2)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, hidden, weight1, bias1, weight2 = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            slope = bf16_rows(slope)
            hidden_slope = Weight(weight2).product(slope, out=scratch("slope", hidden))
            acted = scratch("group", hidden)
            ones = torch.ones(len(hidden), hidden.shape[-1])
            sums = run_map(
                "ACTED_SLOPE", hidden[:, None], gradient=hidden_slope, factor=ones, shift=bias1, gates=ones,
                mean_slopes=torch.zeros_like(ones), out=acted,
            )  # fmt: skip
            return (
                Weight(weight1).product(hidden_slope).to(ctx.in_dtype),
                WeightSlope(*weight1.shape).add(hidden_slope, source).total, sums[0].sum(dim=0),
                WeightSlope(*weight2.shape).add(slope, acted).total, sum_of_rows(slope),
            )  # fmt: skip


class _Linear(torch.autograd.Function):
    """A linear layer on tokens: (B, N, C) -> (B, N, D) bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        source = bf16_rows(x)
        ctx.save_for_backward(source, weight)
        ctx.in_dtype = x.dtype
        return Weight(weight.T, bias).product(source)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, weight = ctx.saved_tensors
        slope = bf16_rows(slope)
        weight_slope = WeightSlope(*weight.shape).add(slope, source).total
        return Weight(weight).product(slope).to(ctx.in_dtype), weight_slope, sum_of_rows(slope)
