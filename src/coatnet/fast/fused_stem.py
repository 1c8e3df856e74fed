"""S0 in training as one autograd function on the kernels: convolutions, BatchNorm and GELU between them. bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coatnet import native
from coatnet.fast.batch_norm import Moments, batch_norm_of
from coatnet.fast.kernels import (
    BF16,
    Weight,
    WeightSlope,
    bf16_rows,
    floats,
    groups,
    run_map,
    sum_of_rows,
)
from coatnet.fast.operations import run, scratch, together
from coatnet.model.layers import ConvStem


class Convolution(NamedTuple):
    """What a convolution of the stem learns."""

    weight: Tensor
    bias: Tensor

    @property
    def rows(self) -> Tensor:
        """The weight, lines of taps one after the other: (D, 9 C)."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)

    def of_patches(self, patches: Tensor) -> Tensor:
        """Convolve what was unfolded: (B, h, w, 9 C or more) -> (B, h, w, D) bf16."""
        rows = F.pad(self.rows, (0, patches.shape[3] - self.rows.shape[1]))
        return Weight(rows.T, self.bias).product(patches)

    @property
    def back(self) -> Tensor:
        """The weight of the way back: (C, 9 D)."""
        return self.weight.flip(2, 3).permute(1, 2, 3, 0).flatten(1)


def weights_of(stem: ConvStem) -> list[Tensor]:
    """Return what the stem learns: of each convolution and each norm, in turns, weight and bias."""
    layers: list[Any] = [layer for layer in stem if not isinstance(layer, nn.GELU)]
    return [part for layer in layers for part in (layer.weight, layer.bias)]


def _convolutions(weights: Sequence[Tensor]) -> list[Convolution]:
    return [Convolution(*floats(weights[first : first + 2])) for first in range(0, len(weights), 4)]


class Stemmed(torch.autograd.Function):
    """S0: images (B, C, H, W) float -> (B, D, h, w) bf16. Images get no gradient.

    Kept are the images' patches and the maps that BatchNorm norms, but for the first, which comes again at little cost.
    What the activation makes of the maps exists for a group of images at a time.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, stem: ConvStem, *weights: Tensor) -> Tensor:
        first, *inner = _convolutions(weights)
        norms = [batch_norm_of(norm) for norm in list(stem)[1::3]]
        ctx.moments = []
        with together():
            patches = _unfold(images, stem)
            made = [first.of_patches(patches)]
            for convolution, norm in zip(inner, norms, strict=True):
                sums, affine = run_map("MOMENTS", made[-1]), floats([norm.weight, norm.bias])
                ctx.moments.append(Moments.of(sums, patches[..., 0].numel(), *affine, norm.eps))
                made.append(_act_and_convolve(made[-1], ctx.moments[-1], convolution))
        for moments, norm in zip(ctx.moments, norms, strict=True):
            moments.follow(norm)
        ctx.save_for_backward(patches, *made[1:-1], *weights)
        return made[-1].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        num_kept = len(ctx.moments) - 1
        patches, *saved = ctx.saved_tensors
        first, *inner = _convolutions(saved[num_kept:])
        slope = bf16_rows(slope.permute(0, 2, 3, 1))
        with together():
            made = [first.of_patches(patches), *saved[:num_kept]]
            found = [sum_of_rows(slope)]  # from the last to the first
        for before, moments, convolution in zip(made[::-1], ctx.moments[::-1], inner[::-1], strict=True):
            with together():
                slope, weight_slope, sums = _slopes(before, slope, moments, convolution)
                norm_slope, norm_bias_slope, mix = moments.backward(sums)
                run_map("MIXED", before, gradient=slope, mix=mix, out=slope)
            # The bias before a norm has no gradient: BatchNorm takes it away again.
            found += [weight_slope, norm_bias_slope, norm_slope, torch.zeros(len(norm_slope))]
        channels, side, _ = first.weight.shape[1:]
        rows, _ = WeightSlope(slope.shape[3], patches.shape[3]).add(slope, patches).total()
        taps = rows[:, : side * side * channels].unflatten(1, (side, side, channels))
        return None, None, taps.permute(0, 3, 1, 2), *found[::-1]


def _act_and_convolve(x: Tensor, moments: Moments, convolution: Convolution) -> Tensor:
    """Norm, GELU, convolve by 3x3 taps: (B, H, W, C) -> (B, H, W, D)."""
    weight, out = Weight(convolution.rows.T, convolution.bias), x.new_empty(*x.shape[:3], len(convolution.bias))
    padded = _bordered("acted", x[next(groups(x))])
    for group in groups(x):
        inner = padded[: len(x[group])]
        run_map("ACTED", x[group], **_inside(inner), **moments.fields)
        _convolve(inner, weight, out[group])
    return out


def _slopes(x: Tensor, slope: Tensor, moments: Moments, convolution: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through `_act_and_convolve`: the gradients of what GELU took and of the weight, and the former's sums.

    The first lies in scratch, and so may `slope`.
    """
    weight, (B, H, _, width) = Weight(convolution.back.T), x.shape
    padded, acted = _bordered("slope", slope), _bordered("acted", x)
    padded[:, 1:-1, 1:-1] = slope
    sums, ones, zeros = torch.empty(B, H, 2, width), torch.ones(B, width), torch.zeros(B, width)
    acted_slope = scratch("expanded slope", x.shape)
    for group in groups(x):
        _convolve(padded[group], weight, acted_slope[group])
        run_map(
            "ACTED_SLOPE", x[group], gradient=acted_slope[group], gates=ones[group], mean_slopes=zeros[group],
            sums=sums[group], **_inside(acted[group]), **moments.fields,
        )  # fmt: skip
    return acted_slope, _taps_slope(padded, acted), sums


def _unfold(images: Tensor, stem: ConvStem) -> Tensor:
    """Return the 3x3 patches of images (B, C, H, W) that the stem starts with: (B, h, w, 9 C, made even) bf16."""
    images = native.within_reach(images.detach().float())
    stride = cast(nn.Conv2d, stem[0]).stride[0]
    B, C, H, W = images.shape
    patches = images.new_empty(B, -(-H // stride), -(-W // stride), 9 * C + C % 2, dtype=torch.bfloat16)
    image, channel, line, cell = (4 * step for step in images.stride())
    run(
        "UNFOLD", out_type=BF16, images=B, lines=patches.shape[1], cells=patches.shape[2], depth=C,
        width=patches.shape[3], in_lines=H, in_cells=W, kernel=3, stride=stride, padding=1, source=images,
        source_image=image, source_channel=channel, source_line=line, source_cell=cell, out=patches,
    )  # fmt: skip
    return patches


def _bordered(name: str, like: Tensor) -> Tensor:
    """Return scratch for maps (B, H + 2, W + 2, C) with a border of zeros."""
    B, H, W, C = like.shape
    made = scratch(name, (B, H + 2, W + 2, C))
    for edge in (made[:, 0], made[:, -1], made[:, :, 0], made[:, :, -1]):
        edge.zero_()
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


def _taps_slope(slope: Tensor, source: Tensor) -> Tensor:
    """Return the gradient of a 3x3 convolution's weight, (D, C, 3, 3), from bordered maps.

    On flat pixels a tap is an offset: what reaches over an edge meets a slope of zero. The three taps of a line lie
    side by side.
    """
    B, H, W, D = slope.shape
    C = source.shape[3]
    flat_slope, flat_source, start = slope.flatten(0, 2), source.flatten(0, 2), W + 1
    found = WeightSlope(D, 3 * C, segments=3).add(
        flat_slope[start:], flat_source[start - W - 1 :], cells=B * H * W - 2 * start, segment_stride=2 * C * W
    )
    return found.total()[0].view(D, 3, 3, C).permute(0, 3, 1, 2)
