"""From a folded network to a plan: the table of operations that the kernels of `coatnet.native` carry out.

Maps lie channels last, one byte, half or word a channel. A network of the paper's blocks has a plan if its
attention is global and its MBConv blocks are normed by BatchNorm; `why_not` says what stands against it.
"""

# The parts of a module are Tensor | Module to the checker, whatever they are.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOptionalCall=false, reportOptionalMemberAccess=false

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.config import ModelConfig, Precision
from coatnet.fast.packing import PANEL, PER_STEP, Packed, Packing, bias_by_offset, gates_the_map, padded, panels
from coatnet.fast.rows import Map, Rows
from coatnet.layout import EXPANSION, grid_into, unroll
from coatnet.model.attention import Attention, Transformer
from coatnet.model.layers import PatchStem, Pool
from coatnet.model.mbconv import MBConv

# Steps of K that the head sums at once. Its errors go straight into the logits, and long sums round more than short
# ones.
HEAD_PART = 64
# Of a stage's widest map, for all images that it takes at once: the maps of more fall out of the caches, for fewer the
# weights are read more often.
AT_ONCE_BYTES = 4 * 4 * 96 * 56 * 56
VALUE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 1}


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


def images_at_once(config: ModelConfig, precision: Precision) -> list[int]:
    """Return how many images S0 .. S4 take at once at the config's size, each a multiple of what those before it do."""
    widest = [0] * 5  # values an image, by stage
    for block in unroll(config):
        strides_later = block.kind == "C" and config.stride_in == "depthwise"
        rows = math.prod(grid_into(block, config) if strides_later else block.grid)
        if block.kind == "C" and precision == "int8":
            rows = max(rows, block.out_dim)  # of weights, which are scaled for each image
        widest[block.stage] = max(widest[block.stage], EXPANSION * block.out_dim * rows)
    at_once = [1]
    for values in widest[1:]:
        fit = AT_ONCE_BYTES // (VALUE_BYTES[precision] * (values or max(widest)))  # a stage may be empty
        at_once.append(max(at_once[-1], fit - fit % at_once[-1]))
    return [at_once[1], *at_once[1:]]  # the stem goes with S1


def _for_images(first: int, rows: list[dict[str, int]], image_bytes: int) -> list[dict[str, int]]:
    """Return a group's rows for the images from number `first` on, with its map where theirs lies.

    UNFOLD alone reads what is given, and the last row alone writes the group's map.
    """
    unfold = native.KINDS["UNFOLD"]
    moved = [{**row, "source": row["source"] + first} if row["kind"] == unfold else row for row in rows]
    return [*moved[:-1], {**moved[-1], "out": moved[-1]["out"] + first * image_bytes}]


class Plan(Rows):
    """The operations up to the means over S4's map, for a number of images of one size.

    `run` takes images (images, C, H, W) float32 in any memory layout and gives means (images, D). Within it each stage
    takes so many images at once as `images_at_once` says.
    """

    def __init__(self, packing: Packing, images: int, height: int, width: int) -> None:
        super().__init__(packing)
        self.config = replace(packing.network.config, image_size=(height, width))
        self.at_once = images_at_once(self.config, packing.precision)
        x = self._stages(4, images)
        means = torch.empty(images, packing.network.num_features)  # `run` gives others of this shape
        self._add("MEAN", x, means, in_lines=x.data.shape[1], in_cells=x.data.shape[2], width=x.data.shape[3])
        self._close()
        self.given = [(op, op.source) for op in self.ops if op.kind == native.KINDS["UNFOLD"]]

    def run(self, given: Tensor, out: Tensor, num_threads: int) -> None:
        strides = [4 * step for step in given.stride()]
        for op, number in self.given:
            op.source = given.data_ptr() + number * strides[0]
            op.source_image, op.source_channel, op.source_line, op.source_cell = strides
        self.ops[len(self.ops) - 1].out = out.data_ptr()
        native.run(self.ops, num_threads)

    def _stages(self, last: int, count: int, out: Map | None = None) -> Map:
        """Add the rows of S0 to S`last` for so many images; their map lies in `out`, where that is given."""
        network = self.packing.network
        blocks = list(network.stages[last].children()) if last else []
        if last and not blocks:
            return self._stages(last - 1, count, out)
        x = self._in_groups(last - 1, count) if last else self._stem(network.s0, count, out)
        for block in blocks:
            its_out = out if block is blocks[-1] else None
            x = self._mbconv(block, x, its_out) if isinstance(block, MBConv) else self._transformer(block, x, its_out)
        return x

    def _in_groups(self, last: int, count: int) -> Map:
        """Add the rows of S0 to S`last` for as many images as that stage takes at once, group after group."""
        most = self.at_once[last]
        if count <= most:
            return self._stages(last, count)
        blocks = [block for block in unroll(self.config) if block.stage <= last]
        shape = (*blocks[-1].grid, blocks[-1].out_dim) if blocks else (*self.config.grids[0], self.config.widths[0])
        whole = self._map(f"s{last}", (count, *shape), self.packing.type)
        image_bytes = whole.data[0].nbytes
        written: dict[int, list[dict[str, int]]] = {}  # by size: a group's rows are written once
        for first in range(0, count, most):
            size = min(most, count - first)
            if size not in written:
                start = len(self.rows)
                self._stages(last, size, Map(whole.data[:size]))
                written[size] = self.rows[start:]
                del self.rows[start:]
            self.rows += _for_images(first, written[size], image_bytes)
        return whole

    # The parts of the network, each as the rows that compute it

    def _stem(self, stem: nn.Module, count: int, out: Map | None) -> Map:
        if isinstance(stem, PatchStem):
            convs, stride, padding = [stem.project], stem.patch_size, 0
        else:
            convs = [module for module in stem.children() if isinstance(module, nn.Conv2d)]
            stride, padding = convs[0].stride[0], 1
        first, inner = convs[0], convs[1:]
        height, width = self.config.image_size
        size = (-(-height // stride), -(-width // stride))
        kernel = first.kernel_size[0]
        depth = kernel * kernel * first.in_channels
        shape = (count, *size, depth + -depth % PER_STEP[self.packing.type])
        x = self._map("patches", shape, self.packing.type)
        self._row(  # `source` is the number of the first image, until `run` has an address
            "UNFOLD", source=0, out_type=x.type, images=count, lines=size[0], cells=size[1], depth=first.in_channels,
            width=shape[3], in_lines=height, in_cells=width, kernel=kernel, stride=stride, padding=padding, out=x.data,
        )  # fmt: skip
        for number, (conv, into) in enumerate(zip(convs, [*inner, None], strict=True)):
            its_out = out if into is None else None
            x = self._product(f"stem {number}", x, conv, into=into, unfolded=number == 0, out=its_out)
        return x

    def _mbconv(self, block: MBConv, x: Map, out: Map | None) -> Map:
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
        shortcut = self._shortcut(block.shortcut, x)
        return self._product("x", filtered, block.shrink, weights=weights, residual=shortcut, out=out)

    def _transformer(self, block: Transformer, x: Map, out: Map | None) -> Map:
        attention = block.attention
        assert isinstance(attention, Attention)
        normed = self._norm(block.attention_norm, x, self.packing.range_into(attention.qkv))
        if isinstance(block.pool, Pool):
            normed = self._pool(block.pool, normed)
        queries = self._product("queries", normed, attention.qkv)
        mixed = self._attend(attention, queries)
        x = self._product("x", mixed, attention.project, residual=self._shortcut(block.shortcut, x))
        normed = self._norm(block.ffn_norm, x, self.packing.range_into(block.ffn[0]))
        fed = self._product("fed", normed, block.ffn[0], into=block.ffn[2])
        return self._product("x", fed, block.ffn[2], residual=x, out=out)

    def _shortcut(self, shortcut: nn.Module, x: Map) -> Map:
        """Return Proj(Pool(x)), which the branch is added to in place."""
        for part in shortcut.children():
            if isinstance(part, Pool):
                x = self._pool(part, x)
            else:
                x = self._product(f"x {self.packing.names[id(part)]}", self._in_8_bits(x, part), part)
        return x

    # The rows

    def _depthwise(self, source: Map, block: MBConv) -> tuple[Map, Tensor]:
        conv = block.depthwise
        images, in_lines, in_cells, channels = source.data.shape
        stride = conv.stride[0]
        size = (-(-in_lines // stride), -(-in_cells // stride))
        shape = (images, *size, channels)
        out = self._map("filtered", shape, source.type, self.packing.range_into(block.shrink))
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
            "GATE", images=images, lines=lines, cells=cells, depth=channels, width=reduce.out_channels, stride=1,
            sums=sums,
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

    def _pool(self, pool: Pool, source: Map) -> Map:
        images, in_lines, in_cells, channels = source.data.shape
        size = (-(-in_lines // 2), -(-in_cells // 2))
        out = self._map(f"pooled {self.packing.names[id(pool)]}", (images, *size, channels), source.type, source.range8)
        self._add(
            "POOL", source, out.data, lines=size[0], cells=size[1], width=channels, in_lines=in_lines, in_cells=in_cells
        )
        return out

    def _attend(self, attention: Attention, queries: Map) -> Map:
        images, lines, cells, channels = queries.data.shape
        range8 = self.packing.range_into(attention.project)
        out = self._map("mixed", (images, lines, cells, channels // 3), self._type(range8), range8)
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
        out = self._map("bytes", source.data.shape, "UINT8", range8)
        self._add("CONVERT", source, out.data, lines=lines, cells=cells, width=channels, range8=range8)
        return out


class HeadPlan(Rows):
    """The operations from the means of so many images to their logits: LayerNorm, Dense + tanh, classifier.

    They take all images at once, so that the weights are read once a call. 8 bits stay out of them.
    `run` takes means (images, D) and gives logits (images, K).
    """

    def __init__(self, packing: Packing, images: int) -> None:
        super().__init__(packing)
        network = packing.network
        means = torch.empty(images, 1, 1, network.num_features)  # `run` gives others of these shapes
        logits = torch.empty(images, 1, 1, network.config.num_classes)
        x = self._norm(network.norm, Map(means))
        if network.pre_logits is not None:
            x = self._product("dense", x, network.pre_logits, part=HEAD_PART)
            self._add("TANH", x, x.data, width=x.data.shape[3])
        self._product("logits", x, network.classifier, out=Map(logits), part=HEAD_PART)
        self._close()

    def run(self, given: Tensor, out: Tensor, num_threads: int) -> None:
        self.ops[0].source = given.data_ptr()
        self.ops[len(self.ops) - 1].out = out.data_ptr()
        native.run(self.ops, num_threads)
