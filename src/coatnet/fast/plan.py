"""From a folded network to a plan: the table of operations that the kernels of `coatnet.native` carry out.

Maps lie channels last, one byte, half or word a channel. A network of the paper's blocks has a plan if its
attention is global and its MBConv blocks are normed by BatchNorm; `why_not` says what stands against it.
"""

# The parts of a module are Tensor | Module to the checker, whatever they are.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOptionalCall=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.config import ModelConfig
from coatnet.fast.packing import PANEL, PER_STEP, Packed, Packing, bias_by_offset, gates_the_map, padded, panels
from coatnet.fast.rows import Map, Rows
from coatnet.model.attention import Attention, Transformer
from coatnet.model.layers import PatchStem, Pool
from coatnet.model.mbconv import MBConv

# Steps of K that the head sums at once. Its errors go straight into the logits, and long sums round more than short
# ones.
HEAD_PART = 64


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


class Plan(Rows):
    """The operations up to the means over S4's map, for a number of images of one size.

    `run` takes images (images, C, H, W) float32 in any memory layout and gives means (images, D).
    """

    def __init__(self, packing: Packing, images: int, height: int, width: int) -> None:
        super().__init__(packing, images)
        self._trace(height, width)
        self._close()

    def run(self, given: Tensor, out: Tensor, num_threads: int) -> None:
        first = self.ops[0]
        images = native.within_reach(given)
        strides = [4 * step for step in images.stride()]
        first.source = images.data_ptr()
        first.source_image, first.source_channel, first.source_line, first.source_cell = strides
        self.ops[len(self.ops) - 1].out = out.data_ptr()
        native.run(self.ops, num_threads)

    def _trace(self, height: int, width: int) -> None:
        network = self.packing.network
        x = self._stem(network.s0, height, width)
        for block in network.blocks:
            x = self._mbconv(block, x) if isinstance(block, MBConv) else self._transformer(block, x)
        means = torch.empty(self.images, network.num_features)  # `run` gives others of this shape
        self._add("MEAN", x, means, in_lines=x.data.shape[1], in_cells=x.data.shape[2], width=x.data.shape[3])

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
        normed = self._norm(block.attention_norm, x, self.packing.range_into(attention.qkv))
        if isinstance(block.pool, Pool):
            normed = self._pool(normed)
        queries = self._product("queries", normed, attention.qkv)
        mixed = self._attend(attention, queries)
        x = self._product("x", mixed, attention.project, residual=self._shortcut(block.shortcut, x))
        normed = self._norm(block.ffn_norm, x, self.packing.range_into(block.ffn[0]))
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

    def _pool(self, source: Map) -> Map:
        _, in_lines, in_cells, channels = source.data.shape
        size = (-(-in_lines // 2), -(-in_cells // 2))
        out = self._map(f"pooled {len(self.rows)}", size, channels, source.type, source.range8)
        self._add(
            "POOL", source, out.data, lines=size[0], cells=size[1], width=channels, in_lines=in_lines, in_cells=in_cells
        )
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


class HeadPlan(Rows):
    """The operations from the means of so many images to their logits: LayerNorm, Dense + tanh, classifier.

    They take all images at once, so that the weights are read once a call. 8 bits stay out of them.
    `run` takes means (images, D) and gives logits (images, K).
    """

    def __init__(self, packing: Packing, images: int) -> None:
        super().__init__(packing, images)
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
