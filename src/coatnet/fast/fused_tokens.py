"""What training does to tokens, as autograd functions on the kernels: attention and FFN with all around them. bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet import native
from coatnet.fast.fused_shortcut import Projection, pools, shorten, shorten_slope
from coatnet.fast.kernels import (
    BF16,
    Weight,
    WeightSlope,
    bf16_rows,
    floats,
    norm_rows,
    norm_slope,
    pool,
    pool_slope,
    scaled,
)
from coatnet.fast.operations import Fields, bf16, recorded, run
from coatnet.model.attention import Attention, FeedForward, Transformer

HEAD_DIM = 32  # of the heads that the kernels know the way back through (native/attention_slope.h)


def weights_of_ffn(ffn: FeedForward) -> tuple[Tensor, ...]:
    """Return what the FFN learns: of both layers, in turns, weight and bias."""
    layers: list[Any] = [ffn[0], ffn[2]]
    return tuple(part for layer in layers for part in (layer.weight, layer.bias))


def weights_of_attention(block: Transformer) -> tuple[Tensor | None, ...]:
    """Return what the first half of a block learns: of the norm and both layers weight and bias, and the projection."""
    layers: list[Any] = [block.attention_norm, block.attention.qkv, block.attention.project]
    return (*(part for layer in layers for part in (layer.weight, layer.bias)), *Projection.of(block.shortcut))


NUM_WEIGHTS = 8  # of the first half
NUM_KEPT = 11  # of both scales, the biases, the map, and what `_transform` kept


class Transformed(torch.autograd.Function):
    """A block, Eq. 4: y = Proj(Pool(x)) + Attention(Pool(Norm(x))), y + FFN(Norm(y)).

    (B, C, H, W) -> (B, D, h, w) bf16. The branches of each image are scaled by (B,) fp32 each, where that is given.
    Neither attention weights are kept nor what GELU gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Transformer,
        scale_B: Tensor | None,
        ffn_scale_B: Tensor | None,
        bias: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        assert isinstance(block.attention, Attention)
        ctx.options = {"heads": block.attention.num_heads, "pooled": pools(block.shortcut)}
        ctx.in_dtype = x.dtype
        x_rows = bf16_rows(x.permute(0, 2, 3, 1))
        known = (scale_B, ffn_scale_B, None if bias is None else bias.contiguous())
        out, *kept = _transform(*known, x_rows, *floats(weights), **ctx.options)
        ctx.save_for_backward(*known, x_rows, *kept, *weights)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # asked for once, as a checkpoint computes them
        kept, weights = saved[:NUM_KEPT], saved[NUM_KEPT:]
        slope = bf16_rows(slope.permute(0, 2, 3, 1))
        x_slope, *slopes = _transform_slope(slope, *kept, *floats(weights), **ctx.options)
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, None, None, *slopes


@recorded
def _transform(
    scale_B: Tensor | None,
    ffn_scale_B: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    *weights: Tensor,
    heads: int,
    pooled: bool,
) -> tuple[Tensor, ...]:
    """Return the output and what the way back needs: of the first half four maps, of the FFN three."""
    norm, norm_bias, qkv, qkv_bias, project, project_bias, *projection = weights[:NUM_WEIGHTS]
    source = norm_rows(x, norm, norm_bias)
    source = pool(source) if pooled else source
    queries = Weight(qkv.T, qkv_bias).product(source)
    mixed = bf16(*source.shape[:3], len(qkv) // 3)
    run("ATTENTION", source=queries, out=mixed, **_attention(mixed, bias, heads))
    past, shortened = shorten(x, Projection(*projection), pooled=pooled)
    y = _joined(Weight(project.T, project_bias), mixed, past, scale_B)
    out, ffn_source, hidden = _feed(y, ffn_scale_B, *weights[NUM_WEIGHTS:])
    return out, shortened, source, queries, mixed, y, ffn_source, hidden


@recorded
def _transform_slope(slope: Tensor, *inputs: Any, heads: int, pooled: bool) -> tuple[Any, ...]:
    """Return the gradients of x, of the biases and of the weights.

    `inputs` are both scales, the biases, the map, what `_transform` kept, and the weights.
    """
    kept, weights = inputs[:NUM_KEPT], inputs[NUM_KEPT:]
    scale_B, ffn_scale_B, bias, x, shortened, source, queries, mixed, y, ffn_source, hidden = kept
    norm, norm_bias, qkv, _, project, _, *projection = weights[:NUM_WEIGHTS]
    slope, *ffn_slopes = _feed_slope(slope, ffn_scale_B, y, ffn_source, hidden, *weights[NUM_WEIGHTS:])
    past, projection_slopes = shorten_slope(shortened, slope, Projection(*projection))
    slope = slope if scale_B is None else scaled(slope, scale_B)
    project_slopes = WeightSlope(*project.shape).add(slope, mixed).total()
    queries_slope, bias_slope = _through_attention(Weight(project).product(slope), queries, mixed, bias, heads)
    qkv_slopes = WeightSlope(*qkv.shape).add(queries_slope, source).total()
    normed_slope = Weight(qkv).product(queries_slope)
    if pooled:
        normed = norm_rows(x, norm, norm_bias, out=torch.empty_like(x))
        normed_slope = pool_slope(normed, normed_slope, torch.empty_like(x))
        past = pool_slope(x, past, torch.empty_like(x))
    x_slope, norm_slopes = norm_slope(x, normed_slope, norm, past)
    return x_slope, bias_slope, *norm_slopes, *qkv_slopes, *project_slopes, *projection_slopes, *ffn_slopes


def _through_attention(
    slope: Tensor, queries: Tensor, mixed: Tensor, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of queries, keys and values, and of the biases, from that of `mixed`."""
    queries_slope, bias_slope = torch.empty_like(queries), None if bias is None else torch.empty_like(bias)
    run(
        "ATTENTION_SLOPE", source=queries, residual=mixed, gradient=slope, out=queries_slope,
        weight_sums=0 if bias_slope is None else bias_slope, **_attention(mixed, bias, heads),
    )  # fmt: skip
    return queries_slope, bias_slope


def _attention(mixed: Tensor, bias: Tensor | None, heads: int) -> dict[str, Fields]:
    """Return the fields of attention and of its way back."""
    images, lines, cells, width = mixed.shape
    return {
        "type": BF16, "out_type": BF16, "images": images, "lines": lines, "cells": cells, "width": width,
        "heads": heads, "head_dim": HEAD_DIM, "bias": 0 if bias is None else bias,
        "relative": native.RELATIVES["NONE" if bias is None else "PRE"],
    }  # fmt: skip


def _joined(weight: Weight, branch: Tensor, past: Tensor | None, scale_B: Tensor | None) -> Tensor:
    """Return the product of a branch, scaled where that is given, plus what goes past it."""
    if scale_B is None:
        return weight.product(branch, residual=past)
    return scaled(weight.product(branch), scale_B, past)


class Fed(torch.autograd.Function):
    """The FFN: (B, H, W, C) -> the same, bf16; with a norm's weight and bias, x + FFN(Norm(x)).

    The branch of each image is scaled by (B,) fp32, where that is given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale_B: Tensor | None, norm: Tensor | None, norm_bias: Tensor | None, *weights: Tensor
    ) -> Tensor:
        x_rows, learned = bf16_rows(x), (norm, norm_bias, *weights)
        out, *kept = _recorded_feed(x_rows, scale_B, *floats(learned))
        ctx.save_for_backward(scale_B, x_rows, *kept, *learned)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale_B, x_rows, source, hidden, *weights = ctx.saved_tensors
        x_slope, *slopes = _recorded_feed_slope(bf16_rows(slope), scale_B, x_rows, source, hidden, *floats(weights))
        return x_slope.to(ctx.in_dtype), None, *slopes


def _feed(x: Tensor, scale_B: Tensor | None, *weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, what the FFN took, and what GELU took."""
    norm, norm_bias, weight1, bias1, weight2, bias2 = weights
    source = x if norm is None else norm_rows(x, norm, norm_bias)
    hidden = bf16(*x.shape[:-1], len(weight1))
    acted = torch.empty_like(hidden)
    Weight(weight1.T, bias1).product(source, out=acted, act="GELU_KEPT", beside=hidden)
    return _joined(Weight(weight2.T, bias2), acted, None if norm is None else x, scale_B), source, hidden


def _feed_slope(
    whole_slope: Tensor, scale_B: Tensor | None, x: Tensor, source: Tensor, hidden: Tensor, *weights: Any
) -> tuple[Any, ...]:
    """Return the gradients of x and of the weights."""
    norm, _, weight1, _, weight2, _ = weights
    slope = whole_slope if scale_B is None else scaled(whole_slope, scale_B)
    hidden_slope, acted = torch.empty_like(hidden), torch.empty_like(hidden)
    Weight(weight2).product(slope, out=hidden_slope, residual=hidden, act="GELU_SLOPE", beside=acted)
    second = WeightSlope(*weight2.shape).add(slope, acted).total()
    first = WeightSlope(*weight1.shape).add(hidden_slope, source).total()
    x_slope, norm_slopes = Weight(weight1).product(hidden_slope), (None, None)
    if norm is not None:
        x_slope, norm_slopes = norm_slope(x, x_slope, norm, whole_slope)
    return x_slope, *norm_slopes, *first, *second


_recorded_feed, _recorded_feed_slope = recorded(_feed), recorded(_feed_slope)
