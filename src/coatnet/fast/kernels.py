"""The kernels of training as functions of tensors: bf16 maps (images, lines, cells, channels) and products of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from coatnet import native
from coatnet.fast.operations import Fields, fp32, run
from coatnet.fast.packing import PANEL, gates_the_map, padded, panels

BF16 = native.TYPES["BF16"]
GROUP_BYTES = 6 << 20  # of a wide map that goes through several kernels at once, to be found in the caches
STRIP = 14  # lines that some kernels do in one go (native/training.h)
BY_STRIP = ("ACTED_DEPTHWISE", "DEPTHWISE_SLOPE")
SMALL_MAP = 256  # pixels
SMALL_WEIGHT_BYTES = 3 << 18  # of a gradient that stays in the second cache


def num_parts(kind: str, lines: int, cells: int) -> int:
    """Return in how many parts a kernel sums over a map of this size."""
    if kind in BY_STRIP:
        return -(-lines // STRIP)
    return 1 if lines * cells <= SMALL_MAP else lines


def sums_for(kind: str, source: Tensor) -> Tensor:
    """Return memory for a kernel's sums over a map (images, lines, cells, channels): (images, parts, 2, channels)."""
    images, lines, cells, width = source.shape
    return fp32(images, num_parts(kind, lines, cells), 2, width)


def run_map(kind: str, source: Tensor, *, sums: Tensor | None = None, **fields: Fields) -> Tensor:
    """Run a kernel over a map (images, lines, cells, channels); return its sums, (images, parts, 2, channels)."""
    images, lines, cells, width = source.shape
    if kind not in BY_STRIP and "out_line" not in fields and num_parts(kind, lines, cells) == 1:
        lines, cells = 1, lines * cells  # pixel by pixel: as good as one line
    if sums is None:
        sums = fp32(images, lines if "out_line" in fields else num_parts(kind, lines, cells), 2, width)
    run(kind, images=images, lines=lines, cells=cells, width=width, source=source, sums=sums, **fields)
    return sums


def total(sums: Tensor) -> Tensor:
    """Return the sum over the first dimension, float32."""
    out = fp32(*sums.shape[1:])
    run("TOTAL", cells=len(sums), width=out.numel(), sums=sums, out=out)
    return out


def groups(wide: Tensor) -> Iterator[slice]:
    """Cut a map's images into groups that the caches hold."""
    count = len(wide)
    most = max(1, GROUP_BYTES // max(1, wide[0].nbytes))
    size = -(-count // -(-count // most))  # as even as they come
    return (slice(start, start + size) for start in range(0, count, size))


class Weight:
    """A product's weight (K, N), fp32 with one step of 1, packed in bf16, and its bias."""

    def __init__(self, weight_KN: Tensor, bias_N: Tensor | None = None) -> None:
        self.depth, self.width = weight_KN.shape
        panels, steps = -(-self.width // PANEL), -(-self.depth // 2)
        self.packed = torch.empty(panels, steps, PANEL, 2, dtype=torch.bfloat16)
        line, cell = (4 * step for step in weight_KN.stride())
        run(
            "PACK", depth=self.depth, width=self.width, source=weight_KN, source_line=line, source_cell=cell,
            out=self.packed,
        )  # fmt: skip
        self.bias: Fields = 0 if bias_N is None else bias_N

    def product(
        self,
        x: Tensor,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        act: str = "LINEAR",
        beside: Tensor | None = None,
    ) -> Tensor:
        """Multiply the last dimension: (..., K) bf16 -> (..., N) bf16, plus `residual`, which may be `out`.

        With `act` "GELU_KEPT" through GELU, and what that takes goes to `beside`; with "GELU_SLOPE" back through GELU
        that took `residual`, and what it gave goes to `beside`.
        """
        K, N = self.depth, self.width
        out = x.new_empty(*x.shape[:-1], N) if out is None else out
        run(
            "PRODUCT", type=BF16, out_type=BF16, images=1, lines=1, cells=x.numel() // K, depth=K, width=N, segments=1,
            source_cell=2 * K, out_cell=2 * N, source=x, weight=self.packed, bias=self.bias, act=native.ACTS[act],
            residual=0 if residual is None else residual, beside=0 if beside is None else beside, out=out,
        )  # fmt: skip
        return out


def to_be_gated(weight_NK: Tensor, bias_N: Tensor, images: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Return a product's weight and bias as `GatedWeight` takes them, for so many maps of so many pixels."""
    if gates_the_map(pixels, len(weight_NK)):
        return weight_NK, bias_N
    return panels(weight_NK.T), padded(bias_N).repeat(images, 1)


class GatedWeight:
    """A product's weight of N columns, gated by its channels in for each image, and its bias (`to_be_gated`)."""

    def __init__(self, weight: Tensor, bias: Tensor, width: int) -> None:
        self.width = width
        self.raw, self.bias = weight, bias
        self.shared = Weight(weight.T, bias) if weight.dim() == 2 else None

    def product(self, x: Tensor, gates: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """Multiply x (B, H, W, K) bf16, gated by (B, K), into out (B, H, W, N) bf16, plus `residual`. Writes over x."""
        (B, H, W, K), N = x.shape, self.width
        if self.shared is not None:
            run("GATED", type=BF16, images=B, lines=1, cells=H * W, width=K, source=x, gates=gates, out=x)
            self.shared.product(x, out, residual)
            return
        packed = x.new_empty(B, *self.raw.shape)
        run(
            "SCALE", out_type=BF16, images=B, depth=K, width=N, source=gates, weight=self.raw,
            weight_image=packed[0].nbytes, out=packed,
        )  # fmt: skip
        run(
            "PRODUCT", type=BF16, out_type=BF16, images=B, lines=1, cells=H * W, depth=K, width=N, segments=1,
            source_image=2 * K * H * W, source_cell=2 * K, out_image=2 * N * H * W, out_cell=2 * N, source=x,
            weight=packed, weight_image=packed[0].nbytes, bias=self.bias, out=out,
            residual=0 if residual is None else residual,
        )  # fmt: skip


class WeightSlope:
    """The gradients of a product's weight, (N, K) float32, and of its bias, (N,), summed over calls of `add`.

    Small ones are summed over either half of the pixels by themselves. That does not depend on the threads, and two of
    them read what each wrote itself.
    """

    def __init__(self, N: int, K: int, *, segments: int = 1) -> None:
        self.segments = segments
        self.parts = 2 if 4 * N * K * segments <= SMALL_WEIGHT_BYTES else 1
        self.weights, self.biases = fp32(self.parts, N, segments * K), fp32(self.parts, N)
        self.adds = 0

    def add(self, slope: Tensor, x: Tensor, *, cells: int | None = None, segment_stride: int = 0) -> WeightSlope:
        """Add the sum over all rows of slope (..., N) times x (..., K), bf16.

        Or over so many of them, `cells`, where x starts that many bytes further for each segment of the weight.
        """
        _, N, width = self.weights.shape
        K = width // self.segments
        run(
            "WEIGHT_SLOPE", images=self.parts, cells=cells or x.numel() // K, width=N, depth=K, segments=self.segments,
            segment_stride=segment_stride, gradient=slope, source=x, source_cell=2 * x.shape[-1], adds=self.adds,
            out=self.weights, sums=self.biases,
        )  # fmt: skip
        self.adds = 1
        return self

    def total(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the weight, (N, segments x K), and of the bias; nothing is added after it."""
        if self.parts == 1:
            return self.weights[0], self.biases[0]
        return total(self.weights), total(self.biases)


def bf16_rows(x: Tensor) -> Tensor:
    """Return a map as the kernels read it."""
    return x.to(torch.bfloat16).contiguous()


def floats(weights: Iterable[Tensor | None]) -> list[Any]:
    """Return weights as the kernels read them, each a tensor or None as before."""
    return [w if w is None or _is_plain(w) else w.detach().float().contiguous() for w in weights]


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous()


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the channels: (B, H, W, C) bf16 -> the same."""
    (B, H, W, C), out = x.shape, torch.empty_like(x)
    run(
        "NORM", type=BF16, out_type=BF16, images=B, lines=H, cells=W, width=C, source=x, scale=weight,
        bias=bias, out=out,
    )  # fmt: skip
    return out


def norm_slope(x: Tensor, slope: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Go back through `norm_rows`: return the gradient of x plus `residual`, and those of weight and bias, (2, C).

    The first lies where `slope` did.
    """
    sums = run_map("LAYER_SLOPE", x, gradient=slope, scale=weight, residual=residual, out=slope)
    return slope, total(sums.flatten(0, 1))


def pool(x: Tensor) -> Tensor:
    """Max pooling 2x2: (B, H, W, C) bf16 -> (B, ceil(H/2), ceil(W/2), C)."""
    B, H, W, C = x.shape
    out = x.new_empty(B, -(-H // 2), -(-W // 2), C)
    run(
        "POOL", type=BF16, images=B, lines=out.shape[1], cells=out.shape[2], width=C, in_lines=H, in_cells=W, source=x,
        out=out,
    )  # fmt: skip
    return out


def pool_slope(x: Tensor, slope: Tensor, out: Tensor) -> Tensor:
    """Go back through `pool`: the gradient of x, in `out`."""
    B, H, W, C = x.shape
    run(
        "POOL_SLOPE", images=B, lines=slope.shape[1], cells=slope.shape[2], width=C, in_lines=H, in_cells=W, source=x,
        gradient=slope, out=out,
    )  # fmt: skip
    return out


def scaled(x: Tensor, scale_B: Tensor, past: Tensor | None = None) -> Tensor:
    """Multiply each image of a map (B, H, W, C) bf16 by its own number, fp32, and add `past`, where given."""
    (B, H, W, C), out = x.shape, torch.empty_like(x)
    residual = 0 if past is None else past
    run("BRANCH", images=B, lines=H, cells=W, width=C, source=x, gates=scale_B, residual=residual, out=out)
    return out
