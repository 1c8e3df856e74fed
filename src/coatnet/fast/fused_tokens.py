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
    norm_rows,
    norm_slope,
    pool,
    pool_slope,
    run,
    scratch,
    together,
)
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
        norm, norm_bias, qkv, qkv_bias, project, project_bias, *projection = weights
        ctx.pooled = pools(block.shortcut)
        x_rows = bf16_rows(x.permute(0, 2, 3, 1))
        bias = None if bias is None else bias.contiguous()
        with together():
            source = norm_rows(x_rows, norm, norm_bias)
            source = pool(source) if ctx.pooled else source
            B, H, W, _ = source.shape
            queries = Weight(qkv.T, qkv_bias).product(source)
            mixed = queries.new_empty(B, H, W, queries.shape[3] // 3)
            assert isinstance(block.attention, Attention)
            ctx.fields = {
                "type": BF16, "out_type": BF16, "images": B, "lines": H, "cells": W, "width": mixed.shape[3],
                "heads": block.attention.num_heads, "head_dim": HEAD_DIM,
                "relative": native.RELATIVES["NONE" if bias is None else "PRE"],
            }  # fmt: skip
            run("ATTENTION", source=queries, bias=0 if bias is None else bias, out=mixed, **ctx.fields)
            past = shorten(x_rows, Projection(*projection), pooled=ctx.pooled)
            out = Weight(project.T, project_bias).product(mixed, residual=past if scale_B is None else None)
        if scale_B is not None:
            out = past + out * scale_B
        ctx.save_for_backward(x_rows, source, queries, mixed, scale_B, bias, *weights)
        ctx.in_dtype = x.dtype
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_rows, source, queries, mixed, scale_B, bias, *weights = ctx.saved_tensors
        norm, norm_bias, qkv, _, project, _, *projection = weights
        whole_slope = slope = bf16_rows(slope.permute(0, 2, 3, 1))
        if scale_B is not None:
            slope = whole_slope * scale_B
        bias_slope = None if bias is None else torch.zeros_like(bias)
        with together():
            past, projection_slopes = shorten_slope(x_rows, whole_slope, Projection(*projection), pooled=ctx.pooled)
            project_slopes = WeightSlope(*project.shape).add(slope, mixed).total()
            mixed_slope, queries_slope = Weight(project).product(slope), torch.empty_like(queries)
            run(
                "ATTENTION_SLOPE", source=queries, bias=0 if bias is None else bias, residual=mixed,
                gradient=mixed_slope, weight_sums=0 if bias_slope is None else bias_slope, out=queries_slope,
                **ctx.fields,
            )  # fmt: skip
            qkv_slopes = WeightSlope(*qkv.shape).add(queries_slope, source).total()
            normed_slope = Weight(qkv).product(queries_slope)
            if ctx.pooled:
                normed = norm_rows(x_rows, norm, norm_bias, out=scratch("group", x_rows.shape))
                normed_slope = pool_slope(normed, normed_slope, torch.empty_like(x_rows))
                past = pool_slope(x_rows, past, torch.empty_like(x_rows))
            x_slope, norm_slopes = norm_slope(x_rows, normed_slope, norm, past)
        slopes = (*norm_slopes, *qkv_slopes, *project_slopes, *projection_slopes)
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, None, bias_slope, *slopes


class Fed(torch.autograd.Function):
    """The FFN: (B, H, W, C) -> the same, bf16. Of the hidden map what comes before GELU is kept.

    With a norm's weight and bias, x + FFN(Norm(x)); the branch of each image is scaled by (B, 1, 1, 1), where given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale_B: Tensor | None,
        norm: Tensor | None,
        norm_bias: Tensor | None,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        x_rows = bf16_rows(x)
        past = None if norm is None or scale_B is not None else x_rows
        with together():
            source = x_rows if norm is None or norm_bias is None else norm_rows(x_rows, norm, norm_bias)
            hidden = source.new_empty(*source.shape[:-1], len(weight1))
            acted = scratch("group", hidden.shape)
            Weight(weight1.T, bias1).product(source, out=acted, act="GELU_KEPT", beside=hidden)
            out = Weight(weight2.T, bias2).product(acted, residual=past)
        if scale_B is not None:
            out = x_rows + out * scale_B
        ctx.save_for_backward(x_rows, source, hidden, scale_B, norm, weight1, weight2)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_rows, source, hidden, scale_B, norm, weight1, weight2 = ctx.saved_tensors
        whole_slope = slope = bf16_rows(slope)
        if scale_B is not None:
            slope = whole_slope * scale_B
        with together():
            hidden_slope, acted = scratch("slope", hidden.shape), scratch("group", hidden.shape)
            Weight(weight2).product(slope, out=hidden_slope, residual=hidden, act="GELU_SLOPE", beside=acted)
            second = WeightSlope(*weight2.shape).add(slope, acted).total()
            first = WeightSlope(*weight1.shape).add(hidden_slope, source).total()
            x_slope, norm_slopes = Weight(weight1).product(hidden_slope), (None, None)
            if norm is not None:
                x_slope, norm_slopes = norm_slope(x_rows, x_slope, norm, whole_slope)
        slopes = (*norm_slopes, *first, *second)
        return x_slope.to(ctx.in_dtype), None, *slopes
