"""From a folded network to a plan: the table of operations that the kernels of `coatnet.native` carry out.

Maps lie channels last, one byte, half or word a channel. A network of the paper's blocks has a plan if its
attention is global and its MBConv blocks are normed by BatchNorm; `why_not` says what stands against it.
"""

# The parts of a module are Tensor | Module to the checker, whatever they are.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOptionalCall=false, reportOptionalMemberAccess=false

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.config import ModelConfig
from coatnet.fast.calibration import Range8
from coatnet.fast.packing import (
    PANEL,
    PER_STEP,
    TORCH_TYPES,
    Packed,
    Packing,
    bias_by_offset,
    gates_the_map,
    padded,
    panels,
)
from coatnet.model.attention import Attention, Transformer
from coatnet.model.layers import PatchStem, Pool
from coatnet.model.mbconv import MBConv

OVERREAD = 64  # bytes that a vector may reach beyond the last value
CACHE_LINE, ALIAS = 64, 4096  # bytes; pixels a multiple of ALIAS apart share one set of the first cache


def why_not(config: ModelConfig) -> str | None:
    """Return why a network has no plan, or None if it has one."""
    if config.blocks != "paper":
        return f"the kernels have no blocks of the {config.blocks}"
    if config.attention != "global" and "T" in config.layout:
        return f"the kernels have no {config.attention} attention"
    if config.mbconv_norm != "batch" and "C" in config.layout:
        return "the kernels have no LayerNorm in MBConv"
    s3_width = config.s3_mbconv[1] if config.s3_mbconv else 0
    if any(width % 4 for width in (*config.widths, config.head_dim, s3_width)):
        return "widths and head size are not all multiples of 4"
    return None


@dataclass(frozen=True, slots=True)
class Map:
    """A batch of maps in memory: (images, lines, cells, channels), and the range where it is in 8 bits."""

    data: Tensor
    range8: Range8 | None = None

    @property
    def type(self) -> str:
        return next(name for name, dtype in TORCH_TYPES.items() if dtype == self.data.dtype)

    @property
    def pixel_bytes(self) -> int:
        return self.data.stride(2) * self.data.element_size()


class Plan:
    """The operations for a number of images of one size, with the buffers they work in.

    `run` takes images (images, C, H, W) float32 in any memory layout and returns the means over S4's map
    (images, D) float32, which the head turns into logits.
    """

    def __init__(self, packing: Packing, images: int, height: int, width: int) -> None:
        self.packing = packing
        self.images = images
        self.rows: list[dict[str, int]] = []
        self.kept: list[Tensor] = []  # whatever the rows point into
        self.scratch: dict[str, Tensor] = {}
        self.means = torch.empty(images, packing.network.num_features)
        self._trace(height, width)
        self.ops = (native.Op * len(self.rows))(*(native.Op(**row) for row in self.rows))

    def profile(self, images: Tensor, num_threads: int) -> dict[str, float]:
        """Carry the plan out; return the seconds that each kind of row took."""
        seconds, found = (ctypes.c_double * len(self.ops))(), dict[str, float]()
        self.run(images, num_threads, seconds)
        kinds = {number: kind for kind, number in native.KINDS.items()}
        for op, took_s in zip(self.ops, seconds, strict=True):
            found[kinds[op.kind]] = found.get(kinds[op.kind], 0) + took_s
        return found

    def run(self, images: Tensor, num_threads: int, seconds: ctypes.Array[ctypes.c_double] | None = None) -> Tensor:
        """Carry the plan out. The result is overwritten by the next run."""
        first = self.ops[0]
        images = native.within_reach(images, first.kernel)
        strides = [4 * step for step in images.stride()]
        first.source = images.data_ptr()
        first.source_image, first.source_channel, first.source_line, first.source_cell = strides
        native.run(self.ops, num_threads, seconds)
        return self.means

    def _trace(self, height: int, width: int) -> None:
        network = self.packing.network
        x = self._stem(network.s0, height, width)
        for block in network.blocks:
            x = self._mbconv(block, x) if isinstance(block, MBConv) else self._transformer(block, x)
        self._add("MEAN", x, self.means, in_lines=x.data.shape[1], in_cells=x.data.shape[2], width=x.data.shape[3])

    # The parts of the network, each as the rows that compute it

    def _stem(self, stem: nn.Module, height: int, width: int) -> Map:
        if isinstance(stem, PatchStem):
            convs, stride, padding = [stem.project], stem.patch_size, 0
        else:
            convs = [module for module in stem.children() if isinstance(module, nn.Conv2d)]
            stride, padding = convs[0].stride[0], 1
        first, inner = convs[0], convs[1:]
        size = (-(-height // stride), -(-width // stride))
        kernel = first.kernel_size[0]
        depth = kernel * kernel * first.in_channels
        patches = self._map("patches", size, depth + -depth % PER_STEP[self.packing.type], self.packing.type)
        self._row(
            "UNFOLD", out_type=patches.type, images=self.images, lines=size[0], cells=size[1],
            depth=first.in_channels, width=patches.data.shape[3], in_lines=height, in_cells=width, kernel=kernel,
            stride=stride, padding=padding, out=patches.data,
        )  # fmt: skip
        x = self._product("stem 0", patches, first, into=inner[0] if inner else None, unfolded=True)
        for number, conv in enumerate(inner, 1):
            x = self._product(f"stem {number}", x, conv, into=inner[number] if number < len(inner) else None)
        return x

    def _mbconv(self, block: MBConv, x: Map) -> Map:
        source = self._in_8_bits(x, block.expand)
        expanded = self._product("expanded", source, block.expand, into=block.depthwise)
        filtered, sums = self._depthwise(expanded, block)
        gates = self._gates(filtered, sums, block)
        _, lines, cells, channels = filtered.data.shape
        weights = None
        if filtered.range8 is not None or not gates_the_map(lines * cells, block.shrink.out_channels):
            weights = self._gated_weights(filtered, gates, block)
        else:
            self._add("GATED", filtered, filtered.data, lines=lines, cells=cells, width=channels, gates=gates)
        return self._product("x", filtered, block.shrink, weights=weights, residual=self._shortcut(block.shortcut, x))

    def _transformer(self, block: Transformer, x: Map) -> Map:
        attention = block.attention
        assert isinstance(attention, Attention)
        normed = self._norm(block.attention_norm, x, attention.qkv)
        if isinstance(block.pool, Pool):
            normed = self._pool(normed)
        queries = self._product("queries", normed, attention.qkv)
        mixed = self._attend(attention, queries)
        x = self._product("x", mixed, attention.project, residual=self._shortcut(block.shortcut, x))
        normed = self._norm(block.ffn_norm, x, block.ffn[0])
        fed = self._product("fed", normed, block.ffn[0], into=block.ffn[2])
        return self._product("x", fed, block.ffn[2], residual=x)

    def _shortcut(self, shortcut: nn.Module, x: Map) -> Map:
        """Return Proj(Pool(x)), which the branch is added to in place."""
        for part in shortcut.children():
            if isinstance(part, Pool):
                x = self._pool(x)
            else:
                x = self._product(f"x {len(self.rows)}", self._in_8_bits(x, part), part)
        return x

    # The rows

    def _product(
        self,
        name: str,
        source: Map,
        module: nn.Module,
        *,
        into: nn.Module | None = None,
        residual: Map | None = None,
        weights: Packed | None = None,
        unfolded: bool = False,
    ) -> Map:
        """Multiply, then GELU where another product or convolution follows: `into`, which may take 8 bits.

        What goes into a 3x3 convolution gets a border of one pixel of zeros. A residual's map is written over.
        """
        _, in_lines, in_cells, channels = source.data.shape
        packed = weights or self.packing.product(module, source.type)
        segments, stride = (1, 1) if unfolded or isinstance(module, nn.Linear) else (packed.segments, module.stride[0])
        size = tuple(-(-(cells - segments + 1) // stride) for cells in (in_lines, in_cells))
        range8 = self.packing.range_into(into) if into is not None else None
        border = 1 if isinstance(into, nn.Conv2d) and into.groups == 1 and into.kernel_size[0] == 3 else 0
        num_out = module.weight.shape[0]
        into_product = isinstance(into, nn.Linear)
        out = residual or self._map(name, size, num_out, self._type(range8), range8, border, spread=into_product)
        images, (lines, cells) = self.images, size
        if stride == 1 and segments == 1 and border == 0:  # pixel after pixel, whatever line or image they are of
            images, lines, cells = (images, 1, lines * cells) if weights else (1, 1, images * lines * cells)
        line_bytes, out_line_bytes = (made.data.shape[2] * made.pixel_bytes for made in (source, out))
        self._add(
            "PRODUCT", source, out.data[:, border:, border:], images=images, lines=lines, cells=cells, width=num_out,
            range8=out.range8, depth=channels * segments, segments=segments, segment_stride=line_bytes,
            source_image=in_lines * line_bytes, source_line=line_bytes * stride,
            source_cell=source.pixel_bytes * stride, out_image=out.data.shape[1] * out_line_bytes,
            out_line=out_line_bytes, out_cell=out.pixel_bytes, weight=packed.data, bias=packed.bias, scale=packed.scale,
            weight_image=packed.data[0].nbytes if weights else 0, act=native.ACTS["LINEAR" if into is None else "GELU"],
            residual=residual.data if residual else 0,
        )  # fmt: skip
        return out

    def _depthwise(self, source: Map, block: MBConv) -> tuple[Map, Tensor]:
        conv = block.depthwise
        images, in_lines, in_cells, channels = source.data.shape
        stride = conv.stride[0]
        size = (-(-in_lines // stride), -(-in_cells // stride))
        out = self._map("filtered", size, channels, source.type, self.packing.range_into(block.shrink))
        sums = self._buffer("sums", (images, size[0], channels), torch.float32)
        weight = conv.weight.detach().flatten(1).T
        if source.range8 is not None:
            weight = weight * source.range8.step
        pad = torch.zeros(channels) if source.range8 is None else source.range8.zero
        self._add(
            "DEPTHWISE", source, out.data, lines=size[0], cells=size[1], width=channels, in_lines=in_lines,
            in_cells=in_cells, stride=stride, weight=self._keep(weight), bias=self._keep(conv.bias),
            pad=self._keep(pad.to(source.data.dtype)), sums=sums, range8=out.range8,
            source_zero=self._keep(source.range8.zero) if source.range8 else 0,
        )  # fmt: skip
        return out, sums

    def _gates(self, source: Map, sums: Tensor, block: MBConv) -> Tensor:
        """Return squeeze-excite's gates, (images, channels) float32."""
        excite, reduce = block.squeeze_excite.expand, block.squeeze_excite.reduce
        images, lines, cells, channels = source.data.shape
        gates = self._buffer("gates", (images, channels), torch.float32)
        self._row(
            "GATE", images=images, lines=lines, cells=cells, depth=channels, width=reduce.out_channels, sums=sums,
            squeeze=self._keep(reduce.weight.flatten(1)), squeeze_bias=self._keep(reduce.bias),
            excite=self._keep(excite.weight.flatten(1).T), excite_bias=self._keep(excite.bias), out=gates,
        )  # fmt: skip
        return gates

    def _gated_weights(self, source: Map, gates: Tensor, block: MBConv) -> Packed:
        """Scale the weights that shrink by the gates, for each image."""
        (images, channels), shrink = gates.shape, block.shrink
        name = self.packing.names[id(shrink)]
        step = torch.ones(channels) if source.range8 is None else source.range8.step
        raw = self.packing.keep(f"raw {name}", lambda: panels(shrink.weight.flatten(1).T * step[:, None]))
        dtype = torch.int8 if source.type == "UINT8" else source.data.dtype
        columns = raw.shape[0] * PANEL
        packed = self._buffer("scaled", (images, *raw.shape), dtype)
        bias = self._keep(padded(shrink.bias))
        in_8_bits = source.range8 is not None
        made = Packed(
            packed,
            self._buffer("made bias", (images, columns), torch.float32) if in_8_bits else bias.repeat(images, 1),
            self._buffer("made scale", (images, columns), torch.float32),
            1,
        )
        self.kept += [made.bias, made.scale]
        self._row(
            "SCALE", out_type=source.type, images=images, depth=channels, width=shrink.out_channels, source=gates,
            weight=raw, weight_image=packed[0].nbytes, out=packed, bias=bias, made_scale=made.scale,
            made_bias=made.bias, source_zero=self._keep(source.range8.zero) if source.range8 else 0,
        )  # fmt: skip
        return made

    def _pool(self, source: Map) -> Map:
        _, in_lines, in_cells, channels = source.data.shape
        size = (-(-in_lines // 2), -(-in_cells // 2))
        out = self._map(f"pooled {len(self.rows)}", size, channels, source.type, source.range8)
        self._add(
            "POOL", source, out.data, lines=size[0], cells=size[1], width=channels, in_lines=in_lines, in_cells=in_cells
        )
        return out

    def _norm(self, norm: nn.Module, source: Map, into: nn.Module) -> Map:
        _, lines, cells, channels = source.data.shape
        range8 = self.packing.range_into(into)
        out = self._map("normed", (lines, cells), channels, self._type(range8), range8)
        self._add(
            "NORM", source, out.data, lines=lines, cells=cells, width=channels, scale=self._keep(norm.weight),
            bias=self._keep(norm.bias), range8=range8,
        )  # fmt: skip
        return out

    def _attend(self, attention: Attention, queries: Map) -> Map:
        _, lines, cells, channels = queries.data.shape
        range8 = self.packing.range_into(attention.project)
        out = self._map("mixed", (lines, cells), channels // 3, self._type(range8), range8)
        weigh = attention.weigh
        bias: Tensor | int = 0
        if weigh.bias is not None:
            name = f"bias {self.packing.names[id(weigh)]} {lines}x{cells}"
            bias = self.packing.keep(name, lambda: bias_by_offset(weigh.bias.table, (lines, cells)))
        self._add(
            "ATTENTION", queries, out.data, lines=lines, cells=cells, width=channels // 3, heads=attention.num_heads,
            head_dim=channels // 3 // attention.num_heads, relative=native.RELATIVES[weigh.relative.upper()],
            bias=bias, range8=range8,
        )  # fmt: skip
        return out

    def _in_8_bits(self, source: Map, into: nn.Module) -> Map:
        range8 = self.packing.range_into(into)
        if range8 is None or source.type == "UINT8":
            return source
        _, lines, cells, channels = source.data.shape
        out = self._map("bytes", (lines, cells), channels, "UINT8", range8)
        self._add("CONVERT", source, out.data, lines=lines, cells=cells, width=channels, range8=range8)
        return out

    # Memory and rows

    def _type(self, range8: Range8 | None) -> str:
        return "UINT8" if range8 is not None else self.packing.type

    def _map(
        self,
        name: str,
        size: tuple[int, ...],
        channels: int,
        type_: str,
        range8: Range8 | None = None,
        border: int = 0,
        *,
        spread: bool = False,
    ) -> Map:
        """Return a map, with a border in pixels; `spread` where only products read it, which take any stride."""
        dtype = TORCH_TYPES[type_]
        apart = CACHE_LINE // dtype.itemsize if spread and channels * dtype.itemsize % ALIAS == 0 else 0
        shape = (self.images, size[0] + 2 * border, size[1] + 2 * border, channels + apart)
        data = self._buffer(name, shape, dtype)[..., :channels]
        if border:
            data.copy_(range8.zero if range8 else torch.zeros(()))
        return Map(data, range8)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory that the next request by the same name overwrites: what is warm in the caches stays so."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self.scratch or len(self.scratch[name]) < num_bytes:
            self.scratch[name] = self._keep(torch.empty(num_bytes + OVERREAD, dtype=torch.uint8))
        return self.scratch[name][:num_bytes].view(dtype).view(shape)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Hold what a row points to, as the kernels read it: contiguous."""
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1]

    def _add(
        self, kind: str, source: Map, out: Tensor, *, range8: Range8 | None = None, **fields: Tensor | int
    ) -> None:
        """Add a row that turns one map into another."""
        if range8 is not None:
            fields["out_scale"], fields["out_zero"] = self._keep(1 / range8.step), self._keep(range8.zero)
        out_type = next(name for name, dtype in TORCH_TYPES.items() if dtype == out.dtype)
        fields = {"images": self.images, **fields}
        self._row(
            kind, type=native.TYPES[source.type], out_type=native.TYPES[out_type], source=source.data, out=out, **fields
        )

    def _row(self, kind: str, **fields: Tensor | int | str) -> None:
        """Add a row; tensors stand for their addresses, names of types for their numbers."""
        values = {
            name: value.data_ptr()
            if isinstance(value, Tensor)
            else native.TYPES[value]
            if isinstance(value, str)
            else value
            for name, value in fields.items()
        }
        self.rows.append({"kind": native.KINDS[kind], **values})
