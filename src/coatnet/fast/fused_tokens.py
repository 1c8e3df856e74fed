"""What training does to tokens, as autograd functions on the kernels: attention, FFN, linear layers. bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet import native
from coatnet.config import Size
from coatnet.fast.kernels import Weight, WeightSlope, bf16_rows, run, run_map, scratch, sum_of_rows

HEAD_DIM = 32  # of the heads that the kernels know the way back through (native/attention_slope.h)


class Attended(torch.autograd.Function):
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
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, bias, out = ctx.saved_tensors
        slope, qkv_slope = bf16_rows(slope), torch.empty_like(qkv)
        bias_slope = None if bias is None else torch.zeros_like(bias)
        run(
            "ATTENTION_SLOPE", source=qkv, bias=0 if bias is None else bias, residual=out, gradient=slope,
            weight_sums=0 if bias_slope is None else bias_slope, out=qkv_slope, **ctx.fields,
        )  # fmt: skip
        return qkv_slope, bias_slope, None, None


class Fed(torch.autograd.Function):
    """The FFN: tokens (B, N, C) -> the same, bf16. Of the hidden map what comes before GELU is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            source = bf16_rows(x)
            hidden = Weight(weight1.T).product(source)
            acted, ones = scratch("group", hidden.shape), torch.ones(hidden.shape[-1])
            run_map("ACTED", hidden[:, None], factor=ones, shift=bias1.detach(), out=acted)
            out = Weight(weight2.T, bias2).product(acted)
        ctx.save_for_backward(source, hidden, weight1, bias1, weight2)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, hidden, weight1, bias1, weight2 = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            slope = bf16_rows(slope)
            hidden_slope = Weight(weight2).product(slope, out=scratch("slope", hidden.shape))
            acted = scratch("group", hidden.shape)
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


class Linear(torch.autograd.Function):
    """A linear layer on tokens: (B, N, C) -> (B, N, D) bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        source = bf16_rows(x)
        ctx.save_for_backward(source, weight)
        ctx.in_dtype = x.dtype
        return Weight(weight.T, bias).product(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, weight = ctx.saved_tensors
        slope = bf16_rows(slope)
        weight_slope = WeightSlope(*weight.shape).add(slope, source).total
        return Weight(weight).product(slope).to(ctx.in_dtype), weight_slope, sum_of_rows(slope)
