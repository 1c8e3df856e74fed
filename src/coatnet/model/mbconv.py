"""MBConv with pre-activation. Source: arXiv 2106.04803 appendix A.1, Eq. 5, Tables 8 and 9.

BN - 1x1 expand - BN - GELU - 3x3 depthwise - BN - GELU - squeeze-excite - 1x1 shrink, added to the shortcut.
"""

from __future__ import annotations

from torch import Tensor, nn

from coatnet.config import ModelConfig
from coatnet.layout import EXPANSION, SQUEEZE, BlockSpec
from coatnet.model.layers import ChannelNorm, StochasticDepth, batch_norm, shortcut


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means: (B, C, H, W) -> the same."""

    def __init__(self, dim: int, squeezed_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, squeezed_dim, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The mean's gradient takes the order of the dimensions it is given; in that of channels_last it is x's own.
        mean = x.permute(0, 2, 3, 1).mean(dim=(1, 2), keepdim=True).permute(0, 3, 1, 2)
        return x * self.expand(self.act(self.reduce(mean))).sigmoid()


class MBConv(nn.Module):
    """Inverted bottleneck: (B, C, H, W) -> (B, D, h, w), h = ceil(H/2) where the block strides.

    The stride sits in the first 1x1 convolution (Eq. 5) or in the depthwise one (Table 9); both give ceil(n/2) cells,
    as the shortcut's pooling does.
    """

    num_branches = 1

    def __init__(self, config: ModelConfig, spec: BlockSpec) -> None:
        super().__init__()
        hidden = EXPANSION * spec.out_dim
        expand_stride = spec.stride if config.stride_in == "expand" else 1
        depthwise_stride = spec.stride // expand_stride

        def norm(dim: int) -> nn.Module:
            return ChannelNorm(dim) if config.mbconv_norm == "layer" else batch_norm(dim, config.batch_norm_momentum)

        self.shortcut = shortcut(spec.in_dim, spec.out_dim, spec.stride)
        self.norm = norm(spec.in_dim)
        self.expand = nn.Conv2d(spec.in_dim, hidden, 1, stride=expand_stride, bias=False)
        self.expand_norm = norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=depthwise_stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = norm(hidden)
        self.act = nn.GELU()
        self.squeeze_excite = SqueezeExcite(hidden, max(1, spec.out_dim // SQUEEZE))
        self.shrink = nn.Conv2d(hidden, spec.out_dim, 1)
        self.drop = StochasticDepth(spec.drop_rate)

    def forward(self, x: Tensor, draws_B1: Tensor | None = None) -> Tensor:
        hidden = self.act(self.expand_norm(self.expand(self.norm(x))))
        hidden = self.act(self.depthwise_norm(self.depthwise(hidden)))
        branch = self.shrink(self.squeeze_excite(hidden))
        return self.shortcut(x) + self.drop(branch, None if draws_B1 is None else draws_B1[:, 0])
