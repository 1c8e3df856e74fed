"""The blocks of another network that goes by CoAtNet's name: a listing that was copied from page to page.

People have checkpoints of it, and it is a control for the paper's network. What it has otherwise than the paper:
norms come after convolutions and after pooling, not before; hidden widths are four times the width in; attention has
eight heads of 32 at every width; pooling is 3x3 with padding; shortcuts project wherever a stage opens; squeeze-excite
has GELU and no biases, nor have q, k, v, convolutions and classifier; BatchNorm's eps is 1e-5; there is no final norm.

Source: github.com/KKKSQJ/DeepLearning.
Departs, the same at its own sizes: the head takes the mean of the whole map; any input size works; a stage of stride 1
opens with its projection alone. Initial weights and BatchNorm's momentum are the config's, as for the paper's blocks;
its own convolutions begin by He's rule over the fan out, its bias tables at zero, its momentum is 0.1.
"""

from __future__ import annotations

from torch import Tensor, nn

from coatnet.config import ModelConfig, Size
from coatnet.layout import EXPANSION, LISTING_HEADS, SQUEEZE, BlockSpec
from coatnet.model.attention import Attention, FeedForward, to_map, to_tokens
from coatnet.model.layers import ChannelNorm
from coatnet.model.mbconv import SqueezeExcite

BATCH_NORM_EPS = 1e-5


def _batch_norm(dim: int, momentum: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS, momentum=momentum)


def _pool(spec: BlockSpec) -> nn.Module:
    """Build max pooling 3x3 where a block strides: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if spec.stride == 2 else nn.Identity()


def _projection(spec: BlockSpec) -> nn.Module:
    """Build the shortcut's 1x1 convolution, which every stage opens with, wider or not."""
    return nn.Conv2d(spec.in_dim, spec.out_dim, 1, bias=False) if spec.opens_stage else nn.Identity()


class ListingStem(nn.Sequential):
    """S0: 3x3 convolutions, each with BatchNorm and GELU, the first one strided."""

    def __init__(self, in_channels: int, width: int, depth: int, stride: int, momentum: float) -> None:
        parts: list[nn.Module] = []
        for index in range(depth):
            in_dim, step = (in_channels, stride) if index == 0 else (width, 1)
            conv = nn.Conv2d(in_dim, width, 3, stride=step, padding=1, bias=False)
            parts += [conv, _batch_norm(width, momentum), nn.GELU()]
        super().__init__(*parts)


class ListingSqueezeExcite(SqueezeExcite):
    """The paper's, with GELU and without biases."""

    def __init__(self, dim: int, squeezed_dim: int) -> None:
        super().__init__(dim, squeezed_dim)
        self.reduce = nn.Conv2d(dim, squeezed_dim, 1, bias=False)
        self.act = nn.GELU()
        self.expand = nn.Conv2d(squeezed_dim, dim, 1, bias=False)


class ListingMBConv(nn.Module):
    """1x1 expand, 3x3 depthwise, squeeze-excite, 1x1 shrink, a norm after each: (B, C, H, W) -> (B, D, h, w)."""

    num_branches = 1

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        super().__init__()
        hidden, momentum = EXPANSION * spec.in_dim, config.batch_norm_momentum
        self.pool, self.project = _pool(spec), _projection(spec)
        self.expand = nn.Conv2d(spec.in_dim, hidden, 1, stride=spec.stride, bias=False)
        self.expand_norm = _batch_norm(hidden, momentum)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = _batch_norm(hidden, momentum)
        self.act = nn.GELU()
        self.squeeze_excite = ListingSqueezeExcite(hidden, max(1, spec.in_dim // SQUEEZE))
        self.shrink = nn.Conv2d(hidden, spec.out_dim, 1, bias=False)
        self.shrink_norm = _batch_norm(spec.out_dim, momentum)

    def forward(self, x: Tensor, draws_B1: Tensor | None = None) -> Tensor:  # noqa: ARG002  (no stochastic depth)
        hidden = self.act(self.expand_norm(self.expand(x)))
        hidden = self.act(self.depthwise_norm(self.depthwise(hidden)))
        return self.project(self.pool(x)) + self.shrink_norm(self.shrink(self.squeeze_excite(hidden)))


class ListingAttention(Attention):
    """The paper's, with eight heads whatever the width, and no bias on q, k and v: (B, N, C) -> (B, N, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, head_dim: int, grid: Size) -> None:
        inner_dim = LISTING_HEADS * head_dim
        super().__init__(in_dim, inner_dim, head_dim, grid, "pre")
        self.qkv = nn.Linear(in_dim, 3 * inner_dim, bias=False)
        self.project = nn.Linear(inner_dim, out_dim)


class ListingTransformer(nn.Module):
    """Pool, then attention and FFN, each on the normed input and added to it: (B, C, H, W) -> (B, D, h, w)."""

    num_branches = 2

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        super().__init__()
        self.pool, self.project = _pool(spec), _projection(spec)
        self.attention_norm = ChannelNorm(spec.in_dim)
        self.attention = ListingAttention(spec.in_dim, spec.out_dim, config.head_dim, spec.grid)
        self.ffn_norm = ChannelNorm(spec.out_dim)
        self.ffn = FeedForward(spec.out_dim, EXPANSION * spec.in_dim)

    def forward(self, x: Tensor, draws_B2: Tensor | None = None) -> Tensor:  # noqa: ARG002  (no stochastic depth)
        x = self.pool(x)
        grid = (x.shape[2], x.shape[3])
        mixed = self.attention(to_tokens(self.attention_norm(x)), grid)
        x = self.project(x) + to_map(mixed, grid)
        return x + to_map(self.ffn(to_tokens(self.ffn_norm(x))), grid)
