"""What training does to tokens, as autograd functions on the kernels: attention and FFN with all around them. bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet import native
from coatnet.fast.fused_shortcut import Projection, pools, shorten, shorten_slope
from coatnet.fast.kernels import BF16, Weight, WeightSlope, bf16_rows, floats, norm_rows, norm_slope, pool, pool_slope
from coatnet.fast.operations import Fields, recorded, run, scratch
from coatnet.model.attention import Attention, FeedForward, Transformer

HEAD_DIM = 32  # of the heads that the kernels know the way back through (native/attention_slope.h)


def weights_of_ffn(ffn: FeedForward) -> tuple[Tensor, ...]:
    """Return what the FFN learns: of both layers, in turns, weight and bias."""
    layers: list[Any] = [ffn[0], ffn[2]]
    return tuple(part for layer in layers for part in (layer.weight, layer.bias))


class Attended(torch.autograd.Function):
    """Proj(Pool(x)) + Attention(Pool(Norm(x))), Eq. 4: (B, C, H, W) -> (B, D, h, w) bf16.

    The branch of each image is scaled by (B, 1, 1, 1), where that is given. No attention weights are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Transformer, scale_B: Tensor | None, bias: Tensor | None, *weights: Tensor
    ) -> Tensor:
        assert isinstance(block.attention, Attention)
        ctx.options = {"heads": block.attention.num_heads, "pooled": pools(block.shortcut)}
        ctx.in_dtype = x.dtype
        x_rows = bf16_rows(x.permute(0, 2, 3, 1))
        bias = None if bias is None else bias.contiguous()
        out, past, *kept = _attend(x_rows, bias, *floats(weights), scaled=scale_B is not None, **ctx.options)
        if scale_B is not None:
            out = past + out * scale_B
        ctx.save_for_backward(scale_B, bias, x_rows, *kept, *weights)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale_B, bias, x_rows, source, queries, mixed, *weights = ctx.saved_tensors
        slope = bf16_rows(slope.permute(0, 2, 3, 1))
        scaled = None if scale_B is None else slope * scale_B
        x_slope, bias_slope, *slopes = _attend_slope(
            slope, scaled, bias, x_rows, source, queries, mixed, *floats(weights), **ctx.options
        )
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, None, bias_slope, *slopes


@recorded
def _attend(
    x: Tensor, bias: Tensor | None, *weights: Tensor, heads: int, pooled: bool, scaled: bool
) -> tuple[Tensor, ...]:
    """Return the output, or apart what attention gives and what goes past it; and what the way back needs."""
    norm, norm_bias, qkv, qkv_bias, project, project_bias, *projection = weights
    source = norm_rows(x, norm, norm_bias)
    source = pool(source) if pooled else source
    queries = Weight(qkv.T, qkv_bias).product(source)
    mixed = torch.empty(*source.shape[:3], len(qkv) // 3, dtype=torch.bfloat16)
    run("ATTENTION", source=queries, out=mixed, **_attention(mixed, bias, heads))
    past = shorten(x, Projection(*projection), pooled=pooled)
    out = Weight(project.T, project_bias).product(mixed, residual=None if scaled else past)
    return out, past if scaled else None, source, queries, mixed


@recorded
def _attend_slope(
    whole_slope: Tensor,
    scaled: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    source: Tensor,
    queries: Tensor,
    mixed: Tensor,
    *weights: Tensor,
    heads: int,
    pooled: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, of the biases and of the weights. `scaled` is the branch's, where it is another."""
    norm, norm_bias, qkv, _, project, _, *projection = weights
    slope = whole_slope if scaled is None else scaled
    past, projection_slopes = shorten_slope(x, whole_slope, Projection(*projection), pooled=pooled)
    project_slopes = WeightSlope(*project.shape).add(slope, mixed).total()
    mixed_slope, queries_slope = Weight(project).product(slope), torch.empty_like(queries)
    bias_slope = None if bias is None else torch.empty_like(bias)
    run(
        "ATTENTION_SLOPE", source=queries, residual=mixed, gradient=mixed_slope, out=queries_slope,
        weight_sums=0 if bias_slope is None else bias_slope, **_attention(mixed, bias, heads),
    )  # fmt: skip
    qkv_slopes = WeightSlope(*qkv.shape).add(queries_slope, source).total()
    normed_slope = Weight(qkv).product(queries_slope)
    if pooled:
        normed = norm_rows(x, norm, norm_bias, out=scratch("group", x.shape))
        normed_slope = pool_slope(normed, normed_slope, torch.empty_like(x))
        past = pool_slope(x, past, torch.empty_like(x))
    x_slope, norm_slopes = norm_slope(x, normed_slope, norm, past)
    return x_slope, bias_slope, *norm_slopes, *qkv_slopes, *project_slopes, *projection_slopes


def _attention(mixed: Tensor, bias: Tensor | None, heads: int) -> dict[str, Fields]:
    """Return the fields of attention and of its way back."""
    images, lines, cells, width = mixed.shape
    return {
        "type": BF16, "out_type": BF16, "images": images, "lines": lines, "cells": cells, "width": width,
        "heads": heads, "head_dim": HEAD_DIM, "bias": 0 if bias is None else bias,
        "relative": native.RELATIVES["NONE" if bias is None else "PRE"],
    }  # fmt: skip


class Fed(torch.autograd.Function):
    """The FFN: (B, H, W, C) -> the same, bf16. Of the hidden map what comes before GELU is kept.

    With a norm's weight and bias, x + FFN(Norm(x)); the branch of each image is scaled by (B, 1, 1, 1), where given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale_B: Tensor | None, norm: Tensor | None, norm_bias: Tensor | None, *weights: Tensor
    ) -> Tensor:
        x_rows = bf16_rows(x)
        out, source, hidden = _feed(x_rows, *floats([norm, norm_bias, *weights]), scaled=scale_B is not None)
        if scale_B is not None:
            out = x_rows + out * scale_B
        ctx.save_for_backward(scale_B, x_rows, source, hidden, norm, *weights)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale_B, x_rows, source, hidden, norm, weight1, _, weight2, _ = ctx.saved_tensors
        slope = bf16_rows(slope)
        scaled = None if scale_B is None else slope * scale_B
        x_slope, *slopes = _feed_slope(slope, scaled, x_rows, source, hidden, *floats([norm, weight1, weight2]))
        return x_slope.to(ctx.in_dtype), None, *slopes


@recorded
def _feed(
    x: Tensor,
    norm: Tensor | None,
    norm_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, or the branch by itself where that is `scaled`; what the FFN took; what GELU took."""
    source = x if norm is None or norm_bias is None else norm_rows(x, norm, norm_bias)
    hidden = torch.empty(*x.shape[:-1], len(weight1), dtype=torch.bfloat16)
    acted = scratch("group", hidden.shape)
    Weight(weight1.T, bias1).product(source, out=acted, act="GELU_KEPT", beside=hidden)
    out = Weight(weight2.T, bias2).product(acted, residual=None if norm is None or scaled else x)
    return out, source, hidden


@recorded
def _feed_slope(
    whole_slope: Tensor,
    scaled: Tensor | None,
    x: Tensor,
    source: Tensor,
    hidden: Tensor,
    norm: Tensor | None,
    weight1: Tensor,
    weight2: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of the weights. `scaled` is the branch's, where it is another."""
    slope = whole_slope if scaled is None else scaled
    hidden_slope, acted = scratch("slope", hidden.shape), scratch("group", hidden.shape)
    Weight(weight2).product(slope, out=hidden_slope, residual=hidden, act="GELU_SLOPE", beside=acted)
    second = WeightSlope(*weight2.shape).add(slope, acted).total()
    first = WeightSlope(*weight1.shape).add(hidden_slope, source).total()
    x_slope, norm_slopes = Weight(weight1).product(hidden_slope), (None, None)
    if norm is not None:
        x_slope, norm_slopes = norm_slope(x, x_slope, norm, whole_slope)
    return x_slope, *norm_slopes, *first, *second
