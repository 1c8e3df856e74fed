"""S0 in training as one autograd function on the kernels: convolutions, BatchNorm and GELU between them. bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coatnet.fast.batch_norm import BatchNorms, Moments, Numbers
from coatnet.fast.kernels import (
    BF16,
    Weight,
    WeightSlope,
    bf16_rows,
    floats,
    groups,
    run_map,
)
from coatnet.fast.operations import bf16, fp32, recorded, run
from coatnet.model.layers import ConvStem


def weights_of(stem: ConvStem) -> list[Tensor]:
    """Return what the stem learns: of each convolution and each norm, in turns, weight and bias."""
    layers: list[Any] = [layer for layer in stem if not isinstance(layer, nn.GELU)]
    return [part for layer in layers for part in (layer.weight, layer.bias)]


class Stemmed(torch.autograd.Function):
    """S0: images (B, C, H, W) float -> (B, D, h, w) bf16. Images get no gradient.

    Kept are the images' patches and the maps that BatchNorm norms. What the activation makes of the maps exists for a
    group of images at a time.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, stem: ConvStem, *weights: Tensor) -> Tensor:
        norms, images = BatchNorms(*list(stem)[1::3]), images.detach().float()
        convolutions, affine = _as_read(weights)
        stride = cast(nn.Conv2d, stem[0]).stride[0]
        out, *kept = _stem(images, *convolutions, *affine, *norms.running(), stride=stride, numbers=norms.numbers())
        norms.count_batch()
        ctx.save_for_backward(*kept, *weights)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        num_weights = len(ctx.needs_input_grad) - 2
        saved = ctx.saved_tensors
        kept, weights = saved[:-num_weights], saved[-num_weights:]
        slope = bf16_rows(slope.permute(0, 2, 3, 1))
        back = [_of_the_way_back(weight) for weight in weights[4::4]]
        width = weights[0].shape[0]
        plain = fp32(len(slope), width).fill_(1), fp32(len(slope), width).zero_()  # as if a squeeze-excite did nothing
        taps, *slopes = _stem_slope(slope, *plain, *back, *kept)
        channels, side, _ = weights[0].shape[1:]
        taps = taps[:, : side * side * channels].unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
        # The bias before a norm has no gradient: BatchNorm takes it away again.
        return None, None, taps, *(fp32(width).zero_() if slope is None else slope for slope in slopes)


def _as_read(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return of all convolutions, in turns, the weight as (D, 9 C) and the bias; and what the norms learn.

    Lines of taps lie one after the other; the first's rows are made even, as patches are.
    """
    convolutions, affine = list[Tensor](), list[Tensor]()
    for first in range(0, len(weights), 4):
        weight, bias = floats(weights[first : first + 2])
        rows = weight.permute(0, 2, 3, 1).flatten(1)
        convolutions += [F.pad(rows, (0, rows.shape[1] % 2)), bias]
        affine += floats(weights[first + 2 : first + 4])
    return convolutions, affine


def _of_the_way_back(weight: Tensor) -> Tensor:
    """Return a convolution's weight for the way back: (C, 9 D)."""
    return weight.detach().float().flip(2, 3).permute(1, 2, 3, 0).flatten(1)


@recorded
def _stem(images: Tensor, *inputs: Tensor, stride: int, numbers: tuple[Numbers, ...]) -> tuple[Tensor, ...]:
    """Return the map, the patches, the maps between, and what each norm found.

    `inputs` are of the convolutions weights and biases, of the norms the same, and their running statistics.
    """
    num_norms = len(numbers)
    convolutions, norms = _pairs(inputs[: 2 * num_norms + 2]), _pairs(inputs[2 * num_norms + 2 :])
    patches = _unfold(images, stride)
    made, found = [Weight(convolutions[0][0].T, convolutions[0][1]).product(patches)], list[Tensor]()
    for number, (weight, bias) in enumerate(convolutions[1:]):
        sums, affine, running = run_map("MOMENTS", made[-1]), norms[number], norms[num_norms + number]
        moments = Moments.of(sums, patches[..., 0].numel(), affine, running, numbers[number])
        made.append(_act_and_convolve(made[-1], moments, Weight(weight.T, bias)))
        found.append(moments.found)
    return made[-1], patches, *made[:-1], *found


@recorded
def _stem_slope(slope: Tensor, ones: Tensor, zeros: Tensor, *inputs: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the first convolution's weight, as rows, and of all that follows; None for no gradient.

    `inputs` are the inner convolutions' weights for the way back and what `_stem` kept.
    """
    num_norms = len(inputs) // 3  # as many weights, maps between and moments
    back, patches, made, found = (
        inputs[:num_norms], inputs[num_norms], inputs[num_norms + 1 : -num_norms], inputs[-num_norms:],
    )  # fmt: skip
    slopes = list[Tensor | None]()  # from the last to the first; a norm takes the bias before it away again
    for before, moments, weight in zip(made[::-1], found[::-1], back[::-1], strict=True):
        of = Moments(moments, before[..., 0].numel())
        slope, taps_slope, bias_slope, sums = _slopes(before, slope, of, Weight(weight.T), ones, zeros)
        scale_slope, shift_slope, mix = of.backward(sums)
        run_map("MIXED", before, gradient=slope, mix=mix, out=slope)
        slopes += [None if slopes else bias_slope, taps_slope, shift_slope, scale_slope]
    return WeightSlope(slope.shape[3], patches.shape[3]).add(slope, patches).total()[0], None, *slopes[::-1]


def _pairs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


def _act_and_convolve(x: Tensor, moments: Moments, weight: Weight) -> Tensor:
    """Norm, GELU, convolve by 3x3 taps: (B, H, W, C) -> (B, H, W, D)."""
    out = bf16(*x.shape[:3], weight.width)
    padded = _bordered(x[next(groups(x))])
    for group in groups(x):
        inner = padded[: len(x[group])]
        run_map("ACTED", x[group], **_inside(inner), **moments.fields)
        _convolve(inner, weight, out[group])
    return out


def _slopes(
    x: Tensor, slope: Tensor, moments: Moments, weight: Weight, ones: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go back through `_act_and_convolve`: the gradients of what GELU took, of weight and bias, and the first's sums.

    `weight` is that of the way back.
    """
    B, H, _, width = x.shape
    padded, acted = _bordered(slope, slope), _bordered(x)
    sums, acted_slope = fp32(B, H, 2, width), torch.empty_like(x)
    for group in groups(x):
        _convolve(padded[group], weight, acted_slope[group])
        run_map(
            "ACTED_SLOPE", x[group], gradient=acted_slope[group], gates=ones[group], mean_slopes=zeros[group],
            sums=sums[group], **_inside(acted[group]), **moments.fields,
        )  # fmt: skip
    return acted_slope, *_taps_slope(padded, acted), sums


def _unfold(images: Tensor, stride: int) -> Tensor:
    """Return the 3x3 patches of images (B, C, H, W) that the stem starts with: (B, h, w, 9 C, made even) bf16."""
    B, C, H, W = images.shape
    patches = torch.empty(B, -(-H // stride), -(-W // stride), 9 * C + C % 2, dtype=torch.bfloat16)
    image, channel, line, cell = (4 * step for step in images.stride())
    run(
        "UNFOLD", out_type=BF16, images=B, lines=patches.shape[1], cells=patches.shape[2], depth=C,
        width=patches.shape[3], in_lines=H, in_cells=W, kernel=3, stride=stride, padding=1, source=images,
        source_image=image, source_channel=channel, source_line=line, source_cell=cell, out=patches,
    )  # fmt: skip
    return patches


def _bordered(like: Tensor, source: Tensor | None = None) -> Tensor:
    """Return maps (B, H + 2, W + 2, C) with a border of zeros, and `source` in it, where that is given."""
    B, H, W, C = like.shape
    made = bf16(B, H + 2, W + 2, C)
    run("BORDERED", images=B, lines=H, cells=W, width=C, source=0 if source is None else source, out=made)
    return made


def _inside(padded: Tensor) -> dict[str, Tensor | int]:
    """Return the fields of a kernel that writes what lies within the border of maps (B, H + 2, W + 2, C) bf16."""
    return {"out": padded[:, 1:, 1:], "out_image": 2 * padded.stride(0), "out_line": 2 * padded.stride(1)}


def _convolve(padded: Tensor, weight: Weight, out: Tensor) -> None:
    """Convolve bordered maps (B, H + 2, W + 2, C) by 3x3 taps into (B, H, W, D)."""
    B, H, W, D = out.shape
    C = padded.shape[3]
    run(
        "PRODUCT", type=BF16, out_type=BF16, images=B, lines=H, cells=W, depth=3 * C, width=D, segments=3,
        segment_stride=2 * C * (W + 2), source_image=2 * C * (W + 2) * (H + 2), source_line=2 * C * (W + 2),
        source_cell=2 * C, out_image=2 * D * H * W, out_line=2 * D * W, out_cell=2 * D, source=padded,
        weight=weight.packed, bias=weight.bias, out=out,
    )  # fmt: skip


def _taps_slope(slope: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a 3x3 convolution's weight, (D, C, 3, 3), and bias, (D,), from bordered maps.

    On flat pixels a tap is an offset: what reaches over an edge meets a slope of zero. The three taps of a line lie
    side by side.
    """
    B, H, W, D = slope.shape
    C = source.shape[3]
    flat_slope, flat_source, start = slope.flatten(0, 2), source.flatten(0, 2), W + 1
    found = WeightSlope(D, 3 * C, segments=3).add(
        flat_slope[start:], flat_source[start - W - 1 :], cells=B * H * W - 2 * start, segment_stride=2 * C * W
    )
    taps, bias = found.total()
    return taps.view(D, 3, 3, C).permute(0, 3, 1, 2), bias
