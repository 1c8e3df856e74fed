"""The small parts that both kinds of block share: pooling, norms over channels, shortcuts, stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-3
LAYER_NORM_EPS = 1e-5


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: (B, C, H, W) -> the same. In channels_last it moves no memory."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that LayerNorm gives it)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pool(nn.MaxPool2d):
    """Max pooling 2x2 of stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)). Source: Eq. 4; 2x2 is inferred."""

    def __init__(self) -> None:
        super().__init__(kernel_size=2, stride=2, ceil_mode=True)


def shortcut(in_dim: int, out_dim: int, stride: int) -> nn.Module:
    """Build Proj(Pool(x)) of Eq. 4 and 5: pooling only where the block strides, projection only where it widens."""
    parts: list[nn.Module] = []
    if stride == 2:
        parts.append(Pool())
    if in_dim != out_dim:
        parts.append(nn.Conv2d(in_dim, out_dim, 1))
    return nn.Sequential(*parts)


class StochasticDepth(nn.Module):
    """Drop a residual branch for some samples in training, and scale the others so that the mean stays.

    The draws come from outside, one uniform number in [0, 1) a sample, so that a caller can key them to the sample.
    Source: Huang et al. 2016 (arXiv:1603.09382); Table 10.
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, branch: Tensor, draw_B: Tensor | None) -> Tensor:
        scale_B = self.scale(draw_B, branch.dtype)
        return branch if scale_B is None else branch * scale_B.view(-1, *[1] * (branch.dim() - 1))

    def scale(self, draw_B: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what each sample's branch is multiplied with, (B,); None where nothing is dropped."""
        if draw_B is None or not self.training or self.drop_rate == 0.0:
            return None
        return (draw_B >= self.drop_rate).to(dtype) / (1.0 - self.drop_rate)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate:.3g}"


class PatchStem(nn.Module):
    """Project each patch of a picture, zeros beyond its edge: (B, C, H, W) -> (B, D, ceil(H/p), ceil(W/p))."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.project(F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size)))


class ConvStem(nn.Sequential):
    """S0: 3x3 convolutions with BatchNorm and GELU between them, the first one strided. Source: A.1; order inferred."""

    def __init__(self, in_channels: int, width: int, depth: int, stride: int, momentum: float) -> None:
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)]
        for _ in range(depth - 1):
            parts += [batch_norm(width, momentum), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)]
        super().__init__(*parts)


def batch_norm(dim: int, momentum: float) -> nn.BatchNorm2d:
    """Build a BatchNorm with the reference's eps; momentum is the newest batch's share, PyTorch's sense."""
    return nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS, momentum=momentum)
