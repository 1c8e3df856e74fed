"""The network's form for training: the same blocks and stem, with fewer passes over memory.

On a processor, in bf16 where autocast asks for it, a block takes its fused form; on CUDA, compiled, attention is one
kernel (`flex_attention.py`). Everything else takes the readable blocks as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.config import Size
from coatnet.fast.flex_attention import use_flex_attention
from coatnet.fast.fused_mbconv import Inverted, Weights
from coatnet.fast.fused_stem import Stemmed, weights_of
from coatnet.fast.fused_tokens import HEAD_DIM, Attended, Fed, Linear
from coatnet.fast.packing import bias_by_offset
from coatnet.model.attention import Attention, FeedForward
from coatnet.model.layers import ConvStem
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet

# Attention's tiles are tried out: those that torch takes untried do not fit shared memory beside a bias in fp32 where
# heads are of 64 or 128. The large products stay cuBLAS's and cuDNN's: to try out Triton's takes minutes.
CUDA_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "ATEN",
    "max_autotune_conv_backends": "ATEN",
}


def for_training(network: CoAtNet, *, compiled: bool = False) -> nn.Module:
    """Return the network in its fastest form for training where its weights lie; weights and names stay.

    `compiled` asks for `torch.compile`; it sees one size of batch and image at a time, as training has them.
    """
    if not compiled:
        return _fuse(network)
    if network.classifier.weight.device.type != "cuda":
        return torch.compile(network)  # pyright: ignore[reportReturnType]
    # Not with CUDA graphs: they would hold gradients in memory that the next microbatch writes to.
    return torch.compile(use_flex_attention(network), dynamic=False, options=CUDA_OPTIONS)  # pyright: ignore[reportReturnType]


def _fuse(network: CoAtNet) -> CoAtNet:
    """Give the network's blocks, in place, their fused class where the kernels can run.

    The fused blocks are used while BatchNorm gathers statistics under bf16 autocast on a processor, and only then.
    """
    if native.missing("bf16") is None:
        for module in network.modules():
            if type(module) is MBConv and _fits(module):
                module.__class__ = _FusedMBConv  # what a copy or a checkpoint sees is the same module
            elif type(module) is ConvStem and _fits_stem(module):
                module.__class__ = _FusedStem
            elif type(module) is Attention and _fits_attention(module):
                module.__class__ = _FusedAttention
            elif type(module) is FeedForward and module[0].weight.shape[1] % 4 == 0:  # pyright: ignore
                module.__class__ = _FusedFeedForward
    return network


def _fits_stem(stem: ConvStem) -> bool:
    norms = list(stem)[1::3]  # convolution, norm, GELU, convolution, ...
    return all(type(norm) is nn.BatchNorm2d and norm.num_features % 2 == 0 for norm in norms) and bool(norms)


def _fits_attention(attention: Attention) -> bool:
    width = attention.project.in_features
    return (
        attention.weigh.relative != "post"
        and width // attention.num_heads == HEAD_DIM
        and attention.qkv.in_features % 4 == 0
    )


def _fits(block: MBConv) -> bool:
    norms = (block.norm, block.expand_norm, block.depthwise_norm)
    widths = (block.expand.in_channels, block.shrink.out_channels)
    return (
        all(type(norm) is nn.BatchNorm2d for norm in norms)
        and block.depthwise.stride[0] == 1
        and not any(width % 4 for width in widths)
    )


def _is_wanted(x: Tensor) -> bool:
    """Whether this is training in bf16 on a processor, uncompiled."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class _FusedMBConv(MBConv):
    def forward(self, x: Tensor, draws_B1: Tensor | None = None) -> Tensor:
        if not (_is_wanted(x) and self.expand_norm.training and self.depthwise_norm.training):
            return super().forward(x, draws_B1)
        branch = Inverted.apply(self.norm(x), self, *Weights.of(self))
        return self.shortcut(x) + self.drop(branch, None if draws_B1 is None else draws_B1[:, 0])


class _FusedStem(ConvStem):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Sequential gives it)
        if not (_is_wanted(input) and all(norm.training for norm in list(self)[1::3]) and not input.requires_grad):
            return super().forward(input)
        return Stemmed.apply(input, self, *weights_of(self))


class _FusedFeedForward(FeedForward):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Sequential gives it)
        if not _is_wanted(input):
            return super().forward(input)
        first, _, second = self
        return Fed.apply(input, first.weight, first.bias, second.weight, second.bias)


class _FusedAttention(Attention):
    def forward(self, x_BNC: Tensor, grid: Size) -> Tensor:
        if not _is_wanted(x_BNC):
            return super().forward(x_BNC, grid)
        bias = None if self.weigh.bias is None else bias_by_offset(self.weigh.bias.table, grid)
        qkv = Linear.apply(x_BNC, self.qkv.weight, self.qkv.bias)
        mixed = Attended.apply(qkv, bias, self.num_heads, grid)
        return Linear.apply(mixed, self.project.weight, self.project.bias)
