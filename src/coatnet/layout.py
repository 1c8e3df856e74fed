"""A network's config unrolled into its blocks, and what they cost, by arithmetic alone (no torch).

The network is built from this list and the counts are taken from it, so the two cannot drift apart.
Source: Tables 3 and 11, appendix A.1; the counting rules are those that reproduce the paper's parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coatnet.config import ModelConfig, Size

EXPANSION = 4  # hidden width of MBConv and FFN, over the width out; in the listing over the width in
SQUEEZE = 4  # the same width over the squeeze-excite bottleneck
LISTING_HEADS = 8  # of the listing's attention, at every width


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block of S1 .. S4."""

    stage: int
    kind: Literal["C", "T"]
    in_dim: int
    out_dim: int
    stride: int
    grid: Size  # (h, w) of its output at the config's image size
    drop_rate: float  # stochastic depth
    opens_stage: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What a network costs. Multiply-adds are those of convolutions, linear layers and attention products."""

    num_params: int
    gmacs: float


def unroll(config: ModelConfig) -> tuple[BlockSpec, ...]:
    """List the blocks of S1 .. S4 in order.

    Stochastic depth grows as rate * block / total from 0, as in the reference code.
    Departs: vit_rel has no stages in the paper; its blocks are dealt to S1 .. S4 in four nearly equal parts.
    """
    total = sum(depth for _, _, depth, _ in _parts(config))
    blocks: list[BlockSpec] = []
    in_dim = config.widths[0]
    for stage, kind, depth, width in _parts(config):
        grid = config.grids[0] if config.layout == "vit_rel" else config.grids[stage]
        for _ in range(depth):
            opens_stage = not blocks or blocks[-1].stage != stage
            stride = config.strides[stage] if opens_stage and config.layout != "vit_rel" else 1
            drop_rate = config.stochastic_depth_rate * len(blocks) / total
            blocks.append(BlockSpec(stage, kind, in_dim, width, stride, grid, drop_rate, opens_stage))
            in_dim = width
    return tuple(blocks)


def _parts(config: ModelConfig) -> list[tuple[int, Literal["C", "T"], int, int]]:
    """Return (stage, kind, blocks, channels) of each run of equal blocks; S3 of C-6 and C-7 has two."""
    if config.layout == "vit_rel":
        depth, width = config.depths[0], config.widths[0]
        return [(stage, "T", depth * stage // 4 - depth * (stage - 1) // 4, width) for stage in (1, 2, 3, 4)]
    parts: list[tuple[int, Literal["C", "T"], int, int]] = []
    for stage in (1, 2, 3, 4):
        if stage == 3 and config.s3_mbconv is not None:
            parts.append((3, "C", *config.s3_mbconv))
        kind = "C" if config.layout[stage - 1] == "C" else "T"
        parts.append((stage, kind, config.depths[stage], config.widths[stage]))
    return parts


def count(config: ModelConfig) -> Counts:
    """Count parameters and multiply-adds at the config's image size."""
    parts = [count_stem(config), *(count_block(config, block) for block in unroll(config)), count_head(config)]
    return Counts(sum(num_params for num_params, _ in parts), sum(macs for _, macs in parts) / 1e9)


def count_block(config: ModelConfig, block: BlockSpec) -> tuple[int, int]:
    """Count parameters and multiply-adds of one block."""
    if config.blocks == "listing":
        return _count_listing_mbconv(block) if block.kind == "C" else _count_listing_transformer(config, block)
    return _count_mbconv(config, block) if block.kind == "C" else _count_transformer(config, block)


def count_head(config: ModelConfig) -> tuple[int, int]:
    """Count parameters and multiply-adds of norm, Dense and classifier."""
    dim = config.widths[-1]
    if config.blocks == "listing":
        return dim * config.num_classes, dim * config.num_classes
    dense = dim * dim if config.head == "dense" else 0
    num_params = 2 * dim + dense + (dim if dense else 0) + dim * config.num_classes + config.num_classes
    return num_params, dense + dim * config.num_classes


def _cells(grid: Size) -> int:
    return grid[0] * grid[1]


def count_stem(config: ModelConfig) -> tuple[int, int]:
    """Count parameters and multiply-adds of S0."""
    width, cells = config.widths[0], _cells(config.grids[0])
    if config.layout == "vit_rel":
        weights = config.in_channels * config.patch_size**2 * width
        return weights + width, weights * cells
    first = config.in_channels * 9 * width + width
    norm = 2 * width
    more = config.depths[0] - 1
    weights = (config.in_channels + more * width) * 9 * width
    if config.blocks == "listing":
        return weights + config.depths[0] * norm, weights * cells
    return first + more * (norm + 9 * width * width + width), weights * cells


def grid_into(block: BlockSpec, config: ModelConfig) -> Size:
    """Return the grid that enters a block that takes the stride of its stage."""
    return config.grids[block.stage - 1] if block.stride == 2 else block.grid


def _count_mbconv(config: ModelConfig, block: BlockSpec) -> tuple[int, int]:
    hidden, squeezed = EXPANSION * block.out_dim, max(1, block.out_dim // SQUEEZE)
    expand, depthwise, shrink = block.in_dim * hidden, 9 * hidden, hidden * block.out_dim
    squeeze_excite = 2 * hidden * squeezed
    norms = 2 * (block.in_dim + hidden + hidden)
    num_params = norms + expand + depthwise + squeeze_excite + squeezed + hidden + shrink + block.out_dim
    cells = _cells(block.grid)
    expand_cells = cells if config.stride_in == "expand" else _cells(grid_into(block, config))
    macs = expand * expand_cells + (depthwise + shrink) * cells + squeeze_excite
    return _with_shortcut(block, num_params, macs)


def _count_transformer(config: ModelConfig, block: BlockSpec) -> tuple[int, int]:
    cells, dim = _cells(block.grid), block.out_dim
    qkv, out, ffn = 3 * block.in_dim * dim, dim * dim, 2 * EXPANSION * dim * dim
    norms = 2 * block.in_dim + 2 * dim
    biases = 3 * dim + dim + EXPANSION * dim + dim
    tables = (dim // config.head_dim) * _num_offsets(config, block.grid)
    macs = (qkv + out + ffn) * cells + _attention_macs(config, block.grid, dim)
    return _with_shortcut(block, norms + qkv + out + ffn + biases + tables, macs)


def _num_offsets(config: ModelConfig, grid: Size) -> int:
    if config.relative_attention == "none" or config.attention == "linear":
        return 0
    height, width = (config.window_size,) * 2 if config.attention == "window" else grid
    return (2 * height - 1) * (2 * width - 1)


def _attention_macs(config: ModelConfig, grid: Size, dim: int) -> int:
    """Count the two products of attention: each query with every key, each weight with every value."""
    if config.attention == "linear":
        return (2 * config.head_dim + 1) * _cells(grid) * dim  # the last product is each query with the keys' sum
    if config.attention == "window":
        side = config.window_size
        windows = -(-grid[0] // side) * -(-grid[1] // side)
        return 2 * windows * side**4 * dim
    return 2 * _cells(grid) ** 2 * dim


def _with_shortcut(block: BlockSpec, num_params: int, macs: int) -> tuple[int, int]:
    if block.in_dim == block.out_dim:
        return num_params, macs
    weights = block.in_dim * block.out_dim
    return num_params + weights + block.out_dim, macs + weights * _cells(block.grid)


def _count_listing_mbconv(block: BlockSpec) -> tuple[int, int]:
    hidden, squeezed = EXPANSION * block.in_dim, max(1, block.in_dim // SQUEEZE)
    by_cell = block.in_dim * hidden + 9 * hidden + hidden * block.out_dim + _listing_shortcut(block)
    squeeze_excite = 2 * hidden * squeezed
    norms = 2 * (hidden + hidden + block.out_dim)
    return by_cell + squeeze_excite + norms, by_cell * _cells(block.grid) + squeeze_excite


def _count_listing_transformer(config: ModelConfig, block: BlockSpec) -> tuple[int, int]:
    cells, dim = _cells(block.grid), block.out_dim
    inner, hidden = LISTING_HEADS * config.head_dim, EXPANSION * block.in_dim
    by_cell = 3 * block.in_dim * inner + inner * dim + 2 * dim * hidden + _listing_shortcut(block)
    biases = dim + hidden + dim
    norms = 2 * block.in_dim + 2 * dim
    tables = LISTING_HEADS * _num_offsets(config, block.grid)
    return by_cell + biases + norms + tables, by_cell * cells + _attention_macs(config, block.grid, inner)


def _listing_shortcut(block: BlockSpec) -> int:
    """Count the weights of the projection, which opens every stage, wider or not."""
    return block.in_dim * block.out_dim if block.opens_stage else 0
