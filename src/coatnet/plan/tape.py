"""The readable network's training step as a tape of operations, and what autograd keeps of each for the way back.

Each row is one operation of `model/` in the order in which it runs: the map that it writes, the maps that it reads,
and those of them that its backward pass needs. Under bf16 autocast convolutions and products read bf16 copies of their
weights, which autograd keeps too; bias tables, softmax and, on CUDA but not on a processor, LayerNorm stay in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from coatnet.config import FloatPrecision, ModelConfig
from coatnet.errors import ConfigError
from coatnet.layout import EXPANSION, SQUEEZE, BlockSpec, count_block, count_head, count_stem, grid_into, unroll

DeviceType = Literal["cuda", "cpu"]
FP32, INT64 = 4, 8  # bytes
STATISTICS = 2 * FP32  # LayerNorm keeps mean and deviation of each cell


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; sizes are bytes an image, or counts of parameters."""

    writes: str
    reads: tuple[str, ...]  # the maps that get a gradient from it
    saves: tuple[str, ...]  # the maps that its backward pass needs
    keeps: int = 0  # what else its backward pass needs: indices of maxima, statistics
    scratch: int = 0  # what its backward pass takes and gives back
    params: int = 0  # whose gradient it gives
    weights: int = 0  # how many of them are weights and biases of convolutions and linear layers
    fixed: int = 0  # bytes of both passes that no batch changes: a bias laid out for all pairs of tokens
    is_sum: bool = False  # its gradient is passed on as it is: no new map


@dataclass(slots=True)
class Tape:
    """The operations of one part of the network, the first map's name "x", and the bytes an image of each map."""

    name: str
    low: int  # bytes of what is computed: 2 under bf16 autocast
    num_params: int
    maps: dict[str, int] = field(default_factory=dict[str, int])
    ops: list[Op] = field(default_factory=list[Op])
    is_block: bool = False  # what activation checkpointing computes twice and FSDP shards by itself
    needs_gradient: bool = True  # whether "x" does; pictures do not, and stay with the caller

    @property
    def holds_x(self) -> bool:
        """Whether the first map stays after the forward pass: a backward pass needs it, or the caller holds it."""
        return not self.needs_gradient or any("x" in op.saves for op in self.ops)

    def add(
        self,
        writes: str,
        elements: int,
        reads: tuple[str, ...],
        saves: tuple[str, ...] = (),
        *,
        size: int = 0,
        keeps: int = 0,
        scratch: int = 0,
        params: int = 0,
        weights: int = 0,
        fixed: int = 0,
        is_sum: bool = False,
    ) -> str:
        """Append an operation and return the name of its map; `size` bytes an element, `low` if not given."""
        self.maps[writes] = elements * (size or self.low)
        op = Op(writes, reads, saves, keeps, scratch * self.low, params + weights, weights, fixed, is_sum)
        self.ops.append(op)
        return writes

    def copied(self, op: Op) -> int:
        """Return the bytes of autocast's copy of an operation's weights."""
        return self.low * op.weights if self.low < FP32 else 0


def record(config: ModelConfig, precision: FloatPrecision, device: DeviceType) -> list[Tape]:
    """Return the tapes of stem, blocks and head in order. Raises: ConfigError for a network that is not planned."""
    if config.blocks != "paper":
        raise ConfigError(f"{config.name} has blocks '{config.blocks}', which cannot be planned. Give 'paper' ones.")
    if config.layout == "vit_rel" or config.attention != "global" or config.mbconv_norm != "batch":
        raise ConfigError(
            f"{config.name} ({config.layout}, {config.attention} attention, {config.mbconv_norm} norm) cannot be "
            "planned. Give a network of C and T stages with global attention and BatchNorm."
        )
    low = 2 if precision == "bf16" else FP32
    tapes = [_stem(config, low)]
    for number, block in enumerate(unroll(config)):
        tape = Tape(f"S{block.stage} block {number}", low, count_block(config, block)[0], is_block=True)
        tape.maps["x"] = block.in_dim * prod(grid_into(block, config)) * low
        if block.kind == "C":
            _mbconv(tape, config, block)
        else:
            _transformer(tape, config, block, norm_size=FP32 if device == "cuda" else low)
        tapes.append(tape)
    return [*tapes, _head(config, low)]


def mixing_share(tapes: Sequence[Tape]) -> float:
    """Return the share of the parameters that mix channels, which Muon takes; their biases count with them."""
    apart = {"depthwise", "classifier"}
    mixing = sum(op.weights for tape in tapes for op in tape.ops if op.writes not in apart)
    return mixing / sum(tape.num_params for tape in tapes)


def _stem(config: ModelConfig, low: int) -> Tape:
    tape = Tape("S0", low, count_stem(config)[0], needs_gradient=False)
    width, cells = config.widths[0], prod(config.grids[0])
    pixels, channels = config.in_channels * prod(config.image_size), config.in_channels
    tape.maps["x"] = pixels * FP32  # the caller holds the pictures
    image = tape.add("image", pixels, ()) if low < FP32 else "x"
    x = tape.add("conv0", width * cells, (), (image,), weights=(9 * channels + 1) * width)
    for n in range(1, config.depths[0]):
        x = tape.add(f"norm{n}", width * cells, (x,), (x,), params=2 * width)
        x = tape.add(f"act{n}", width * cells, (x,), (x,))
        x = tape.add(f"conv{n}", width * cells, (x,), (x,), weights=(9 * width + 1) * width)
    return tape


def _mbconv(tape: Tape, config: ModelConfig, block: BlockSpec) -> None:
    hidden, squeezed = EXPANSION * block.out_dim, max(1, block.out_dim // SQUEEZE)
    before, cells = prod(grid_into(block, config)), prod(block.grid)
    expanded = hidden * (cells if config.stride_in == "expand" else before)
    spread = hidden * cells
    tape.add("normed", block.in_dim * before, ("x",), ("x",), params=2 * block.in_dim)
    tape.add("expand", expanded, ("normed",), ("normed",), weights=block.in_dim * hidden)
    tape.add("expand_norm", expanded, ("expand",), ("expand",), params=2 * hidden)
    tape.add("expand_act", expanded, ("expand_norm",), ("expand_norm",))
    tape.add("depthwise", spread, ("expand_act",), ("expand_act",), weights=9 * hidden)
    tape.add("depthwise_norm", spread, ("depthwise",), ("depthwise",), params=2 * hidden)
    tape.add("depthwise_act", spread, ("depthwise_norm",), ("depthwise_norm",))
    tape.add("mean", hidden, ("depthwise_act",))
    gate_weights = 2 * hidden * squeezed + squeezed + hidden
    tape.add("gate", hidden, ("mean",), ("mean", "gate"), weights=gate_weights)
    # The gate's gradient is a sum over a product as large as the map.
    tape.add("gated", spread, ("depthwise_act", "gate"), ("depthwise_act", "gate"), scratch=spread)
    tape.add("branch", block.out_dim * cells, ("gated",), ("gated",), weights=(hidden + 1) * block.out_dim)
    _add_to_shortcut(tape, block, "branch", "out")


def _add_to_shortcut(tape: Tape, block: BlockSpec, branch: str, out: str) -> None:
    """Append Proj(Pool(x)) and its sum with a branch, which stochastic depth may scale before."""
    elements, cut = block.out_dim * prod(block.grid), "x"
    if block.stride == 2:
        cut = _pool(tape, block, "x", "shortcut_pool", tape.low)
    if block.in_dim != block.out_dim:
        cut = tape.add("shortcut", elements, (cut,), (cut,), weights=(block.in_dim + 1) * block.out_dim)
    tape.add(out, elements, (cut, _dropped(tape, block, branch)), is_sum=True)


def _pool(tape: Tape, block: BlockSpec, x: str, writes: str, size: int) -> str:
    elements = block.in_dim * prod(block.grid)
    return tape.add(writes, elements, (x,), (x,), size=size, keeps=elements * INT64)  # where each maximum was


def _dropped(tape: Tape, block: BlockSpec, branch: str) -> str:
    if block.drop_rate == 0:
        return branch
    return tape.add(f"dropped_{branch}", block.out_dim * prod(block.grid), (branch,))


def _transformer(tape: Tape, config: ModelConfig, block: BlockSpec, norm_size: int) -> None:
    before, cells, dim = prod(grid_into(block, config)), prod(block.grid), block.out_dim
    x = _layer_norm(tape, "x", "normed", block.in_dim, before, norm_size)
    if block.stride == 2:
        x = _pool(tape, block, x, "pooled", norm_size)
    x = _cast(tape, x, block.in_dim * cells, norm_size)
    tape.add("qkv", 3 * dim * cells, (x,), (x,), weights=3 * (block.in_dim + 1) * dim)
    tape.add("queries_keys", 2 * dim * cells, ("qkv",))  # laid out head by head
    tape.add("values", dim * cells, ("qkv",))
    weights = _attention_weights(tape, config, block)
    tape.add("mixed", dim * cells, (weights, "values"), (weights, "values"))
    tape.add("joined", dim * cells, ("mixed",))
    tape.add("attended", dim * cells, ("joined",), ("joined",), weights=(dim + 1) * dim)
    _add_to_shortcut(tape, block, "attended", "middle")
    x = _cast(tape, _layer_norm(tape, "middle", "ffn_normed", dim, cells, norm_size), dim * cells, norm_size)
    tape.add("ffn_hidden", EXPANSION * dim * cells, (x,), (x,), weights=EXPANSION * dim * (dim + 1))
    tape.add("ffn_act", EXPANSION * dim * cells, ("ffn_hidden",), ("ffn_hidden",))
    tape.add("fed", dim * cells, ("ffn_act",), ("ffn_act",), weights=(EXPANSION * dim + 1) * dim)
    tape.add("out", dim * cells, ("middle", _dropped(tape, block, "fed")), is_sum=True)


def _attention_weights(tape: Tape, config: ModelConfig, block: BlockSpec) -> str:
    """Append logits, their bias and softmax; return the name of the weights that the values are mixed with."""
    heads, cells = block.out_dim // config.head_dim, prod(block.grid)
    pairs = heads * cells**2
    x, size = tape.add("logits", pairs, ("queries_keys",), ("queries_keys",)), tape.low
    if config.relative_attention == "pre":
        size, is_sum = FP32, tape.low == FP32  # the fp32 bias makes the sum fp32
        tables = heads * prod(2 * side - 1 for side in block.grid)
        x = tape.add("biased", pairs, (x,), size=size, params=tables, fixed=pairs * FP32, is_sum=is_sum)
    x = tape.add("softmax", pairs, (x,), ("softmax",), size=FP32)
    x = _cast(tape, x, pairs, FP32)
    if config.relative_attention == "post":
        tables = heads * prod(2 * side - 1 for side in block.grid)
        x = tape.add("biased", pairs, (x,), params=tables, fixed=pairs * FP32, is_sum=True)
    return x


def _layer_norm(tape: Tape, x: str, writes: str, dim: int, cells: int, size: int) -> str:
    if size > tape.low:
        x = tape.add(f"{x}_fp32", dim * cells, (x,), size=size)
    return tape.add(writes, dim * cells, (x,), (x,), size=size, keeps=STATISTICS * cells, params=2 * dim)


def _cast(tape: Tape, x: str, elements: int, size: int) -> str:
    """Append autocast's copy of a map of `size` bytes an element, where it computes in fewer."""
    return tape.add(f"{x}_low", elements, (x,)) if size > tape.low else x


def _head(config: ModelConfig, low: int) -> Tape:
    tape = Tape("head", low, count_head(config)[0])
    dim, classes = config.widths[-1], config.num_classes
    tape.maps["x"] = dim * prod(config.grids[-1]) * low
    x = tape.add("mean", dim, ("x",))
    x = tape.add("normed", dim, (x,), (x,), params=2 * dim)
    if config.head == "dense":
        x = tape.add("dense", dim, (x,), (x,), weights=(dim + 1) * dim)
        x = tape.add("tanh", dim, (x,), ("tanh",))
    x = tape.add("classifier", classes, (x,), (x,), weights=(dim + 1) * classes)
    x = tape.add("logits_fp32", classes, (x,), size=FP32)
    tape.add("targets", classes, (), size=FP32)
    tape.add("loss", classes, (x,), (x, "targets", "loss"), size=FP32)
    return tape
