"""Transformer blocks with relative attention. Source: arXiv 2106.04803 section 2.1, Eq. 3 and 4, appendix A.1.

Departs: "window" and "linear" attention, the paper's rejected options B and C (section 2.2), are not specified there.
Ours: windows do not overlap or shift; the linear kernel is elu + 1 (arXiv:2006.16236), which has no pairwise logits
and so no relative bias.
"""

# B batch, N tokens (H*W), C channels in, M heads, D head dim, H and W the grid; I and J a token's row and column
# L windows (P rows of Q), S cells in each (h rows of w)

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coatnet.config import ModelConfig, Size
from coatnet.layout import EXPANSION, BlockSpec
from coatnet.model.layers import ChannelNorm, Pool, StochasticDepth, shortcut


class RelativeBias(nn.Module):
    """One learned scalar a head and 2-D offset, laid out for every pair of tokens.

    The table fits the trained grid; for another grid it is interpolated bilinearly (A.1), offset 0 staying in the
    middle. Nothing is kept between calls, so nothing can be out of date.
    """

    def __init__(self, num_heads: int, grid: Size) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def forward(self, grid: Size) -> Tensor:
        """Return the bias of query i and key j, P[i - j]: grid (H, W) -> (M, N, N)."""
        height, width = grid
        size = (2 * height - 1, 2 * width - 1)
        table = resize_table(self.table, size)
        # Windows of the table: [m, i, j, a, b] = P[i + a, j + b]; a counts key rows from the last, so flip it.
        windows = table.unfold(1, height, 1).unfold(2, width, 1)
        return windows.flip(3, 4).reshape(-1, height * width, height * width)


def resize_table(table: Tensor, size: Size) -> Tensor:
    """Interpolate a bias table bilinearly where its size is another (A.1): (M, 2H-1, 2W-1) -> (M, *size)."""
    if table.shape[1:] == size:
        return table
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]


class AttentionWeights(nn.Module):
    """Weigh every key for every query: q, k (B, M, N, D) -> (B, M, N, N).

    "pre" adds the bias to the scaled logits before the softmax, "post" to the weights after it (Eq. 3).
    """

    def __init__(self, num_heads: int, head_dim: int, grid: Size, relative: str) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.relative = relative
        self.bias = None if relative == "none" else RelativeBias(num_heads, grid)

    def forward(self, q_BMND: Tensor, k_BMND: Tensor, grid: Size, mask: Tensor | None = None) -> Tensor:
        logits_BMNN = (q_BMND * self.scale) @ k_BMND.transpose(-2, -1)
        bias_MNN = None if self.bias is None else self.bias(grid)
        if bias_MNN is not None and self.relative == "pre":
            logits_BMNN = logits_BMNN + bias_MNN
        if mask is not None:
            logits_BMNN = logits_BMNN.masked_fill(~mask, float("-inf"))
        at_least_fp32 = torch.promote_types(logits_BMNN.dtype, torch.float32)
        weights_BMNN = logits_BMNN.softmax(dim=-1, dtype=at_least_fp32).to(q_BMND.dtype)
        if bias_MNN is not None and self.relative == "post":
            weights_BMNN = weights_BMNN + bias_MNN.to(q_BMND.dtype)
            if mask is not None:
                weights_BMNN = weights_BMNN.masked_fill(~mask, 0.0)
        return weights_BMNN


class Attention(nn.Module):
    """Multi-head attention over all tokens of a map: (B, N, C) with its grid -> (B, N, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, head_dim: int, grid: Size, relative: str) -> None:
        super().__init__()
        self.num_heads = out_dim // head_dim
        self.qkv = nn.Linear(in_dim, 3 * out_dim)
        self.weigh = AttentionWeights(self.num_heads, head_dim, grid, relative)
        self.project = nn.Linear(out_dim, out_dim)

    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        return self.project(self.mix(*self.heads(x_BNC), grid))

    def heads(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, (B, M, N, D) each."""
        qkv_BN3MD = self.qkv(x_BNC).unflatten(2, (3, self.num_heads, -1))
        q_BMND, k_BMND, v_BMND = qkv_BN3MD.permute(2, 0, 3, 1, 4)
        return q_BMND, k_BMND, v_BMND

    def mix(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Size) -> Tensor:
        """Return each token's mix of values, heads side by side: (B, N, M*D)."""
        return join_heads(self.weigh(q_BMND, k_BMND, grid) @ v_BMND)


def join_heads(x_BMND: Tensor) -> Tensor:
    """(B, M, N, D) -> (B, N, M*D)."""
    return x_BMND.transpose(1, 2).flatten(2)


def cut_windows(x_BMND: Tensor, grid: Size, side: int) -> Tensor:
    """Cut the grid into windows of `side` x `side` cells, zeros beyond the edge: (B, M, N, D) -> (B, L, M, S, D)."""
    rows, columns = (-(-cells // side) for cells in grid)
    pad = (0, 0, 0, columns * side - grid[1], 0, rows * side - grid[0])
    x_BMPhQwD = F.pad(x_BMND.unflatten(2, grid), pad).unflatten(3, (columns, side)).unflatten(2, (rows, side))
    return x_BMPhQwD.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)


def join_windows(x_BLMSD: Tensor, grid: Size, side: int) -> Tensor:
    """Put windows back together and drop what lies beyond the edge: (B, L, M, S, D) -> (B, M, N, D)."""
    (height, width), (rows, columns) = grid, (-(-cells // side) for cells in grid)
    x_BPQMhwD = x_BLMSD.unflatten(1, (rows, columns)).unflatten(4, (side, side))
    x_BMHWD = x_BPQMhwD.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return x_BMHWD[:, :, :height, :width].flatten(2, 3)


class WindowAttention(Attention):
    """Attention inside windows that do not overlap; cells beyond the edge are masked. Source: option B, section 2.2."""

    def __init__(self, in_dim: int, out_dim: int, head_dim: int, side: int, relative: str) -> None:
        super().__init__(in_dim, out_dim, head_dim, (side, side), relative)
        self.side = side

    def mix(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Size) -> Tensor:
        side = self.side
        q_BLMSD, k_BLMSD, v_BLMSD = (cut_windows(x, grid, side) for x in (q_BMND, k_BMND, v_BMND))
        inside_BLMS1 = cut_windows(q_BMND.new_ones(1, 1, grid[0] * grid[1], 1), grid, side).bool()
        weights_BLMSS = self.weigh(q_BLMSD, k_BLMSD, (side, side), inside_BLMS1.transpose(-2, -1))
        return join_heads(join_windows(weights_BLMSS @ v_BLMSD, grid, side))


class LinearAttention(Attention):
    """Attention whose cost grows with N, not N squared, by a kernel in place of the softmax. Source: option C."""

    def __init__(self, in_dim: int, out_dim: int, head_dim: int) -> None:
        super().__init__(in_dim, out_dim, head_dim, (1, 1), "none")

    def mix(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Size) -> Tensor:  # noqa: ARG002
        q_BMND, k_BMND = F.elu(q_BMND) + 1, F.elu(k_BMND) + 1
        summed_BMDD = k_BMND.transpose(-2, -1) @ v_BMND
        total_BMN1 = q_BMND @ k_BMND.sum(dim=-2)[..., None]
        return join_heads(q_BMND @ summed_BMDD / total_BMN1)


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between: (B, N, dim) -> the same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))


class Transformer(nn.Module):
    """Attention, then FFN, each on the normed input and added to it: (B, C, H, W) -> (B, D, h, w).

    Down-sampling (Eq. 4): Proj(Pool(x)) + Attention(Pool(Norm(x))), Norm before Pool.
    """

    num_branches = 2

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        super().__init__()
        self.shortcut = shortcut(spec.in_dim, spec.out_dim, spec.stride)
        self.attention_norm = ChannelNorm(spec.in_dim)
        self.pool = Pool() if spec.stride == 2 else nn.Identity()
        self.attention = _attention(config, spec)
        self.ffn_norm = ChannelNorm(spec.out_dim)
        self.ffn = FeedForward(spec.out_dim, EXPANSION * spec.out_dim)
        self.drop = StochasticDepth(spec.drop_rate)

    def forward(self, x: Tensor, draws_B2: Tensor | None = None) -> Tensor:
        attention_draw_B, ffn_draw_B = (None, None) if draws_B2 is None else draws_B2.unbind(1)
        x = self.attend(x, attention_draw_B)
        fed = to_map(self.ffn(to_tokens(self.ffn_norm(x))), (x.shape[2], x.shape[3]))
        return x + self.drop(fed, ffn_draw_B)

    def attend(self, x: Tensor, draw_B: Tensor | None = None) -> Tensor:
        """Return the first half, what the FFN is added to: (B, C, H, W) -> (B, D, h, w)."""
        pooled = self.pool(self.attention_norm(x))
        grid = (pooled.shape[2], pooled.shape[3])
        mixed = to_map(self.attention(to_tokens(pooled), grid), grid)
        return self.shortcut(x) + self.drop(mixed, draw_B)


def _attention(config: ModelConfig, spec: BlockSpec) -> Attention:
    if config.attention == "linear":
        return LinearAttention(spec.in_dim, spec.out_dim, config.head_dim)
    relative = config.relative_attention
    if config.attention == "window":
        return WindowAttention(spec.in_dim, spec.out_dim, config.head_dim, config.window_size, relative)
    return Attention(spec.in_dim, spec.out_dim, config.head_dim, spec.grid, relative)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C); in channels_last a view."""
    return x.flatten(2).transpose(1, 2)


def to_map(x_BNC: Tensor, grid: Size) -> Tensor:
    """(B, N, C) -> (B, C, H, W) in channels_last, a view."""
    return x_BNC.transpose(1, 2).unflatten(2, grid)
