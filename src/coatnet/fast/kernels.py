"""The kernels of training as functions of tensors: bf16 maps (images, lines, cells, channels) and products of rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet import native
from coatnet.fast.packing import PANEL, gates_the_map, panels

BF16 = native.TYPES["BF16"]
GROUP_BYTES = 6 << 20  # of a wide map that goes through several kernels at once, to be found in the caches
STRIP = 14  # lines that some kernels do in one go (native/training.h)
BY_STRIP = ("ACTED_DEPTHWISE", "DEPTHWISE_SLOPE")
SMALL_MAP = 256  # pixels
SMALL_WEIGHT_BYTES = 3 << 18  # of a gradient that stays in the second cache
Fields = Tensor | int


def run(kind: str, **fields: Fields) -> None:
    """Carry out one operation, or gather it (`together`); tensors stand for their addresses."""
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    op = native.Op(kind=native.KINDS[kind], **values)
    gathered = _GATHERED.__dict__.get("ops")
    if gathered is None:
        native.run((native.Op * 1)(op), torch.get_num_threads())
    else:
        gathered.append((op, fields))


@contextmanager
def together() -> Generator[None]:
    """Gather the operations of this block and carry them out at its end, in order, in one go.

    Within it torch must read nothing that they write, nor write what they read once they are gathered.
    """
    gathered: list[tuple[native.Op, dict[str, Fields]]] = []  # with the fields, whose memory must last until then
    _GATHERED.ops = gathered
    try:
        yield
    finally:
        _GATHERED.ops = None
    native.run((native.Op * len(gathered))(*(op for op, _ in gathered)), torch.get_num_threads())


_GATHERED = threading.local()


def num_parts(kind: str, lines: int, cells: int) -> int:
    """Return in how many parts a kernel sums over a map of this size."""
    if kind in BY_STRIP:
        return -(-lines // STRIP)
    return 1 if lines * cells <= SMALL_MAP else lines


def sums_for(kind: str, source: Tensor) -> Tensor:
    """Return memory for a kernel's sums over a map (images, lines, cells, channels): (images, parts, 2, channels)."""
    images, lines, cells, width = source.shape
    return torch.empty(images, num_parts(kind, lines, cells), 2, width)


def run_map(kind: str, source: Tensor, *, sums: Tensor | None = None, **fields: Fields) -> Tensor:
    """Run a kernel over a map (images, lines, cells, channels); return its sums, (images, parts, 2, channels)."""
    images, lines, cells, width = source.shape
    if kind not in BY_STRIP and "out_line" not in fields and num_parts(kind, lines, cells) == 1:
        lines, cells = 1, lines * cells  # pixel by pixel: as good as one line
    if sums is None:
        sums = torch.empty(images, lines if "out_line" in fields else num_parts(kind, lines, cells), 2, width)
    run(kind, images=images, lines=lines, cells=cells, width=width, source=source, sums=sums, **fields)
    return sums


def total(sums: Tensor) -> Tensor:
    """Return the sum over the first dimension, float32."""
    out = torch.empty(sums.shape[1:])
    run("TOTAL", cells=len(sums), width=out.numel(), sums=sums, out=out)
    return out


def scratch(name: str, shape: Sequence[int]) -> Tensor:
    """Return memory for a bf16 map of this shape, which the next request by the same name in this thread overwrites.

    New memory costs more than what is written to it: the system clears it page by page.
    """
    kept: dict[str, Tensor] = _KEPT.__dict__
    count = math.prod(shape)
    if name not in kept or kept[name].numel() < count:
        kept[name] = torch.empty(count, dtype=torch.bfloat16)
    return kept[name][:count].view(*shape)


_KEPT = threading.local()


def groups(wide: Tensor) -> Iterator[slice]:
    """Cut a map's images into groups that the caches hold."""
    count = len(wide)
    most = max(1, GROUP_BYTES // max(1, wide[0].nbytes))
    size = -(-count // -(-count // most))  # as even as they come
    return (slice(start, start + size) for start in range(0, count, size))


class Weight:
    """A product's weight (K, N), packed in bf16, and its bias."""

    def __init__(self, weight_KN: Tensor, bias_N: Tensor | None = None) -> None:
        self.depth, self.width = weight_KN.shape
        source = weight_KN.detach().float()
        if 1 not in source.stride():
            source = source.contiguous()
        self.packed = source.new_empty(-(-self.width // PANEL), -(-self.depth // 2), PANEL, 2, dtype=torch.bfloat16)
        line, cell = (4 * step for step in source.stride())
        run(
            "PACK", depth=self.depth, width=self.width, source=source, source_line=line, source_cell=cell,
            out=self.packed,
        )  # fmt: skip
        self.bias = _no_bias(-(-self.width // PANEL) * PANEL) if bias_N is None else _padded(bias_N)

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


@cache
def _no_bias(width: int) -> Tensor:
    return torch.zeros(width)


def _padded(bias_N: Tensor) -> Tensor:
    bias_N = bias_N.detach().float()
    return F.pad(bias_N, (0, -len(bias_N) % PANEL)) if len(bias_N) % PANEL else bias_N


class GatedWeight:
    """A product's weight (N, K) and bias for so many maps of so many pixels, gated by its channels in."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor, images: int, pixels: int) -> None:
        self.width = weight_NK.shape[0]
        self.shared = self.raw = None
        if gates_the_map(pixels, self.width):
            self.shared = Weight(weight_NK.T, bias_N)
        else:
            self.raw = panels(weight_NK.detach().T.float())
            self.bias = _padded(bias_N).repeat(images, 1)

    def product(self, x: Tensor, gates: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """Multiply x (B, H, W, K) bf16, gated by (B, K), into out (B, H, W, N) bf16, plus `residual`. Writes over x."""
        (B, H, W, K), N = x.shape, self.width
        if self.shared is not None:
            run("GATED", type=BF16, images=B, lines=1, cells=H * W, width=K, source=x, gates=gates, out=x)
            self.shared.product(x, out, residual)
            return
        assert self.raw is not None
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
        self.weights, self.biases = torch.empty(self.parts, N, segments * K), torch.empty(self.parts, N)
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
    """Return a tensor as the kernels read it."""
    return x.to(torch.bfloat16).contiguous()


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """LayerNorm over the channels: (B, H, W, C) bf16 -> the same."""
    (B, H, W, C), out = x.shape, torch.empty_like(x) if out is None else out
    run(
        "NORM", type=BF16, out_type=BF16, images=B, lines=H, cells=W, width=C, source=x, scale=weight.detach().float(),
        bias=bias.detach().float(), out=out,
    )  # fmt: skip
    return out


def norm_slope(x: Tensor, slope: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Go back through `norm_rows`: return the gradient of x plus `residual`, and those of weight and bias, (2, C).

    The first lies where `slope` did.
    """
    sums = run_map("LAYER_SLOPE", x, gradient=slope, scale=weight.detach().float(), residual=residual, out=slope)
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


def sum_of_rows(slope: Tensor) -> Tensor:
    """Return the gradient of a bias: (B, ..., N) bf16 -> (N,) float32."""
    return total(run_map("MOMENTS", slope.reshape(len(slope), 1, -1, slope.shape[-1])).flatten(0, 1))[0]
