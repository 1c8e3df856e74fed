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
from coatnet.fast.packing import PANEL, bias_by_offset, pack, panels
from coatnet.model.attention import Attention, FeedForward
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet

STRIP = 14  # lines (native/training.h)
HEAD_DIM = 32  # of the heads that the kernels know the way back through (native/attention_slope.h)
Fields = Tensor | int


def for_training(network: CoAtNet) -> CoAtNet:
    """Give the network's blocks, in place, their fused class where the kernels can run; weights and names stay.

    The fused blocks are used while BatchNorm gathers statistics under bf16 autocast on a processor, and only then.
    """
    if native.missing("bf16") is None:
        for module in network.modules():
            if type(module) is MBConv and _fits(module):
                module.__class__ = _FusedMBConv  # what a copy or a checkpoint sees is the same module
            elif type(module) is Attention and module.weigh.relative != "post" and _head_dim(module) == HEAD_DIM:
                module.__class__ = _FusedAttention
            elif type(module) is FeedForward and module[0].weight.shape[1] % 4 == 0:  # pyright: ignore
                module.__class__ = _FusedFeedForward
    return network


def _head_dim(attention: Attention) -> int:
    return attention.project.in_features // attention.num_heads


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
        return self.project(_Attended.apply(self.qkv(x_BNC), bias, self.num_heads, grid))


class _Maps:
    """The kernels on bf16 maps (images, lines, cells, channels)."""

    def __init__(self, shape: torch.Size | tuple[int, ...]) -> None:
        self.images, self.lines, self.cells, self.width = shape
        self.pixels = self.images * self.lines * self.cells

    def run(self, kind: str, out: Tensor | None = None, **fields: Fields) -> Tensor:
        """Run one kernel; return its sums, (2, images, width) float32."""
        sums = torch.empty(self.images, self.lines, 2, self.width)
        _run(
            kind, images=self.images, lines=self.lines, cells=self.cells, width=self.width, sums=sums,
            **({} if out is None else {"out": out}), **fields,
        )  # fmt: skip
        return sums.sum(dim=1).transpose(0, 1)


def _run(kind: str, **fields: Fields) -> None:
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    native.run((native.Op * 1)(native.Op(kind=native.KINDS[kind], **values)), torch.get_num_threads())


def _product(x: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Multiply the last dimension: (..., K) bf16 @ (K, N) -> (..., N) bf16."""
    K, N = weight_KN.shape
    out, packed = x.new_empty(*x.shape[:-1], N), pack(weight_KN, "BF16")
    bias = F.pad(torch.zeros(N) if bias_N is None else bias_N.detach().float(), (0, -N % PANEL))
    _run(
        "PRODUCT", type=native.TYPES["BF16"], out_type=native.TYPES["BF16"], images=1, lines=1, cells=x.numel() // K,
        depth=K, width=N, segments=1, source_cell=2 * K, out_cell=2 * N, source=x, weight=packed, bias=bias, out=out,
    )  # fmt: skip
    return out


def _weight_slope(slope: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a product's weight: (..., N)^T @ (..., K) -> (N, K) float32."""
    N, K = slope.shape[-1], x.shape[-1]
    if N > K:  # the narrower is packed by every thread
        return _weight_slope(x, slope).T
    out = torch.empty(N, K)
    _run("WEIGHT_SLOPE", cells=x.numel() // K, depth=K, width=N, gradient=slope, source=x, out=out)
    return out


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
    def fields(self) -> dict[str, Fields]:
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
    """MBConv's branch after its first norm: (B, C, H, W) -> (B, D, h, w) bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: MBConv, *weights: Tensor) -> Tensor:
        w, stride = _Weights(*weights), block.expand.stride[0]
        with torch.autocast("cpu", enabled=False):
            source = x.permute(0, 2, 3, 1)[:, ::stride, ::stride].to(torch.bfloat16).contiguous()
            expanded = _product(source, w.expand.flatten(1).T)
            maps = _Maps(expanded.shape)
            first = _Moments(maps.run("MOMENTS", source=expanded), maps.pixels, _batch_norm(block.expand_norm))
            filtered = torch.empty_like(expanded)
            sums = maps.run("ACTED_DEPTHWISE", filtered, source=expanded, weight=w.taps, **first.fields)
            second = _Moments(sums, maps.pixels, _batch_norm(block.depthwise_norm))
            acted = torch.empty_like(filtered)
            mean = maps.run("ACTED", acted, source=filtered, **second.fields)[0] / (maps.lines * maps.cells)
            gates = _gates(mean, *w.gate)
            out = _gated_product(acted, gates, w.shrink.flatten(1), w.shrink_bias)
        ctx.save_for_backward(source, expanded, filtered, mean, gates, *weights)
        ctx.first, ctx.second, ctx.stride, ctx.in_shape, ctx.in_dtype = first, second, stride, x.shape, x.dtype
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, expanded, filtered, mean, gates, *weights = ctx.saved_tensors
        w, maps, first, second = _Weights(*weights), _Maps(expanded.shape), ctx.first, ctx.second
        with torch.autocast("cpu", enabled=False):
            slope = slope.permute(0, 2, 3, 1).to(torch.bfloat16).contiguous()
            acted_slope = _product(slope, w.shrink.flatten(1))
            sums = maps.run("GATE_SLOPE", gradient=acted_slope, source=filtered, **second.fields)
            mean_slope, *gate_slopes = _gate_slopes(mean, w, sums[0])
            gated = torch.empty_like(filtered)
            sums = maps.run(
                "ACTED_SLOPE", gated, gradient=acted_slope, source=filtered, gates=gates,
                mean_slopes=(mean_slope / (maps.lines * maps.cells)).contiguous(), **second.fields,
            )  # fmt: skip
            shrink_slope = _weight_slope(slope, gated)
            norm2_slope, norm2_bias_slope, mix = second.backward(sums)
            tap_sums = torch.empty(maps.images * -(-maps.lines // STRIP), 9, maps.width)
            expanded_slope = gated  # its memory, which is free again
            sums = maps.run(
                "DEPTHWISE_SLOPE", expanded_slope, gradient=acted_slope, residual=filtered, source=expanded,
                weight=w.taps, mix=mix, weight_sums=tap_sums, **first.fields,
            )  # fmt: skip
            norm1_slope, norm1_bias_slope, mix = first.backward(sums)
            _run(
                "MIXED", images=maps.images, lines=maps.lines, cells=maps.cells, width=maps.width, source=expanded,
                gradient=expanded_slope, mix=mix, out=expanded_slope,
            )  # fmt: skip
            x_slope = _spread(_product(expanded_slope, w.expand.flatten(1)), ctx.stride, ctx.in_shape)
            slopes = (
                _weight_slope(expanded_slope, source).view_as(w.expand), norm1_slope, norm1_bias_slope,
                tap_sums.sum(dim=0).T.reshape(w.depthwise.shape), norm2_slope, norm2_bias_slope, *gate_slopes,
                shrink_slope.view_as(w.shrink), slope.flatten(0, 2).sum(dim=0, dtype=torch.float32),
            )  # fmt: skip
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, *slopes  # in the order of _Weights


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


def _gated_product(x: Tensor, gates: Tensor, weight_NK: Tensor, bias: Tensor) -> Tensor:
    """Multiply x (B, H, W, K) bf16, gated by image and channel, by the weight -> (B, H, W, N) bf16."""
    B, H, W, K = x.shape
    N = weight_NK.shape[0]
    raw = panels(weight_NK.detach().T.float())
    packed, out = x.new_empty(B, *raw.shape), x.new_empty(B, H, W, N)
    biases = F.pad(bias.detach().float(), (0, -N % PANEL)).repeat(B, 1)
    _run(
        "SCALE", out_type=native.TYPES["BF16"], images=B, depth=K, width=N, source=gates, weight=raw,
        weight_image=packed[0].nbytes, out=packed,
    )  # fmt: skip
    _run(
        "PRODUCT", type=native.TYPES["BF16"], out_type=native.TYPES["BF16"], images=B, lines=1, cells=H * W, depth=K,
        width=N, segments=1, source_image=2 * K * H * W, source_cell=2 * K, out_image=2 * N * H * W, out_cell=2 * N,
        source=x, weight=packed, weight_image=packed[0].nbytes, bias=biases, out=out,
    )  # fmt: skip
    return out


class _Attended(torch.autograd.Function):
    """softmax(q k / sqrt(D) + bias) v: queries, keys and values (B, N, 3C) -> (B, N, C) bf16. No weights are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, num_heads: int, grid: Size) -> Tensor:
        B, N, width = qkv.shape
        qkv, out = qkv.to(torch.bfloat16).contiguous(), qkv.new_empty(B, N, width // 3, dtype=torch.bfloat16)
        ctx.fields = {
            "type": native.TYPES["BF16"], "out_type": native.TYPES["BF16"], "images": B, "lines": grid[0],
            "cells": grid[1], "width": width // 3, "heads": num_heads, "head_dim": HEAD_DIM,
            "relative": native.RELATIVES["NONE" if bias is None else "PRE"],
        }  # fmt: skip
        bias = None if bias is None else bias.contiguous()
        _run("ATTENTION", source=qkv, bias=0 if bias is None else bias, out=out, **ctx.fields)
        ctx.save_for_backward(qkv, bias, out)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, bias, out = ctx.saved_tensors
        slope, qkv_slope = slope.to(torch.bfloat16).contiguous(), torch.empty_like(qkv)
        bias_slope = None if bias is None else torch.zeros_like(bias)
        _run(
            "ATTENTION_SLOPE", source=qkv, bias=0 if bias is None else bias, residual=out, gradient=slope,
            weight_sums=0 if bias_slope is None else bias_slope, out=qkv_slope, **ctx.fields,
        )  # fmt: skip
        return qkv_slope, bias_slope, None, None


class _Fed(torch.autograd.Function):
    """The FFN: tokens (B, N, C) -> the same, bf16. Of the hidden map what comes before GELU is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            source = x.to(torch.bfloat16).contiguous()
            hidden = _product(source, weight1.T)
            maps = _Maps((hidden.shape[0], 1, *hidden.shape[1:]))
            acted, ones = torch.empty_like(hidden), torch.ones(maps.width)
            maps.run("ACTED", acted, source=hidden, factor=ones, shift=bias1.detach())
            out = _product(acted, weight2.T, bias2)
        ctx.save_for_backward(source, hidden, weight1, bias1, weight2)
        ctx.in_dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, hidden, weight1, bias1, weight2 = ctx.saved_tensors
        maps = _Maps((hidden.shape[0], 1, *hidden.shape[1:]))
        with torch.autocast("cpu", enabled=False):
            slope = slope.to(torch.bfloat16).contiguous()
            hidden_slope, acted = _product(slope, weight2), torch.empty_like(hidden)
            ones = torch.ones(maps.images, maps.width)
            sums = maps.run(
                "ACTED_SLOPE", acted, gradient=hidden_slope, source=hidden, factor=ones, shift=bias1, gates=ones,
                mean_slopes=torch.zeros_like(ones),
            )  # fmt: skip
            return (
                _product(hidden_slope, weight1).to(ctx.in_dtype), _weight_slope(hidden_slope, source),
                sums[0].sum(dim=0), _weight_slope(slope, acted), slope.flatten(0, 1).sum(dim=0, dtype=torch.float32),
            )  # fmt: skip
