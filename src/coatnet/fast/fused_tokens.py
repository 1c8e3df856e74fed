"""What training does to tokens, on the kernels: attention and FFN with all around them. bf16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet import native
from coatnet.config import Size
from coatnet.fast.chain import Link
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
from coatnet.fast.operations import Fields, Nested, bf16, fp32, recorded, run
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


class Transformed(Link):
    """A Transformer block, Eq. 4: y = Proj(Pool(x)) + Attention(Pool(Norm(x))), y + FFN(Norm(y)).

    The branches of each image are scaled by (B,) fp32 each, where that is given. Neither attention weights are kept nor
    what GELU gives. `bias` is that of each head by the key's offset, for the grid of the output.
    """

    def __init__(
        self, block: Transformer, size: Size, scale_B: Tensor | None, ffn_scale_B: Tensor | None, bias: Tensor | None
    ) -> None:
        assert isinstance(block.attention, Attention)
        norm = block.ffn_norm
        self.size = size
        self.attention, self.ffn = weights_of_attention(block), (norm.weight, norm.bias, *weights_of_ffn(block.ffn))
        self.learned = (bias, *self.attention, *self.ffn)
        self.scales = scale_B, ffn_scale_B
        self.options = block.attention.num_heads, pools(block.shortcut)

    def read(self) -> tuple[Nested, Nested]:
        bias, attention, ffn = floats(self.learned[:1]), floats(self.attention), floats(self.ffn)
        return (), (self.scales, *bias, tuple(attention), tuple(ffn))

    @staticmethod
    def there(x: Tensor, alone: Nested, both: Nested, options: tuple[int, bool]) -> tuple[Tensor, Nested]:  # noqa: ARG004
        heads, pooled = options
        (scale_B, ffn_scale_B), bias, (norm, norm_bias, qkv, qkv_bias, project, project_bias, *projection), ffn = both
        source = norm_rows(x, norm, norm_bias)
        source = pool(source) if pooled else source
        queries = Weight(qkv.T, qkv_bias).product(source)
        mixed = bf16(*source.shape[:3], len(qkv) // 3)
        noted = fp32(len(x), heads, 2, math.prod(source.shape[1:3]))  # of each query
        run("ATTENTION", source=queries, out=mixed, sums=noted, **_attention(mixed, bias, heads))
        past, shortened = shorten(x, Projection(*projection), pooled=pooled)
        y = _joined(Weight(project.T, project_bias), mixed, past, scale_B)
        out, *fed = _feed(y, ffn_scale_B, *ffn)
        return out, (shortened, source, queries, (mixed, noted), y, *fed)

    @staticmethod
    def back(slope: Tensor, x: Tensor, kept: Nested, both: Nested, options: tuple[int, bool]) -> tuple[Tensor, Nested]:
        heads, pooled = options
        (scale_B, ffn_scale_B), bias, (norm, norm_bias, qkv, _, project, _, *projection), ffn = both
        shortened, source, queries, (mixed, noted), y, *fed = kept
        slope, *ffn_slopes = _feed_slope(slope, ffn_scale_B, y, *fed, *ffn)
        past, projection_slopes = shorten_slope(shortened, slope, Projection(*projection))
        slope = slope if scale_B is None else scaled(slope, scale_B)
        project_slopes = WeightSlope(*project.shape).add(slope, mixed).total()
        queries_slope, bias_slope = _through_attention(
            Weight(project).product(slope), queries, mixed, noted, bias, heads
        )
        qkv_slopes = WeightSlope(*qkv.shape).add(queries_slope, source).total()
        normed_slope = Weight(qkv).product(queries_slope)
        if pooled:
            normed_slope = pool_slope(norm_rows(x, norm, norm_bias), normed_slope, torch.empty_like(x))
            past = pool_slope(x, past, torch.empty_like(x))
        x_slope, norm_slopes = norm_slope(x, normed_slope, norm, past)
        return x_slope, (bias_slope, *norm_slopes, *qkv_slopes, *project_slopes, *projection_slopes, *ffn_slopes)

    def gradients(self, slopes: Nested) -> Sequence[Tensor | None]:
        return slopes


def _through_attention(
    slope: Tensor, queries: Tensor, mixed: Tensor, noted: Tensor, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of queries, keys and values, and of the biases, from that of `mixed`."""
    queries_slope, bias_slope = torch.empty_like(queries), None if bias is None else torch.empty_like(bias)
    run(
        "ATTENTION_SLOPE", source=queries, residual=mixed, sums=noted, gradient=slope, out=queries_slope,
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
