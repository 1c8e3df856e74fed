"""The network's form for training: the same blocks and stem, with fewer passes over memory.

On a processor, in bf16 where autocast asks for it, a block takes its fused form; on CUDA, compiled, attention is one
kernel (`flex_attention.py`). Everything else takes the readable blocks as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]

from coatnet import native
from coatnet.config import Size
from coatnet.fast.batch_norm import gathers
from coatnet.fast.chain import Link, go_through
from coatnet.fast.flex_attention import use_flex_attention
from coatnet.fast.fused_mbconv import Inverted
from coatnet.fast.fused_stem import Stemmed, weights_of
from coatnet.fast.fused_tokens import HEAD_DIM, Fed, Transformed, weights_of_ffn
from coatnet.fast.packing import bias_by_offset
from coatnet.model.attention import Attention, FeedForward, Transformer
from coatnet.model.layers import ConvStem, Pool, StochasticDepth
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
            for plain, fused, fits in _FUSED:
                if type(module) is plain and fits(module):
                    module.__class__ = fused  # what a copy or a checkpoint sees is the same module
    return network


def _fits_stem(stem: ConvStem) -> bool:
    norms = list(stem)[1::3]  # convolution, norm, GELU, convolution, ...
    return all(type(norm) is nn.BatchNorm2d and norm.num_features % 2 == 0 for norm in norms) and bool(norms)


def _fits_attention(attention: nn.Module) -> bool:
    if type(attention) is not Attention or attention.weigh.relative == "post":
        return False
    width, in_dim = attention.project.in_features, attention.qkv.in_features
    return width // attention.num_heads == HEAD_DIM and in_dim % 4 == 0


def _fits_ffn(ffn: FeedForward) -> bool:
    return _linear(ffn[0]).in_features % 4 == 0


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer


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
        if not (_is_wanted(x) and self.can_link()):
            return super().forward(x, draws_B1)
        return go_through(x, [self.link(len(x), (x.shape[2], x.shape[3]), draws_B1)])

    def can_link(self) -> bool:
        """Whether this can be a link now."""
        return all(gathers(norm) for norm in (self.norm, self.expand_norm, self.depthwise_norm))

    def link(self, images: int, size: Size, draws_B1: Tensor | None) -> Link:
        stride = self.expand.stride[0]
        size = (-(-size[0] // stride), -(-size[1] // stride))
        return Inverted(self, size, images, _scale(self.drop, draws_B1, 0))


class _FusedStem(ConvStem):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Sequential gives it)
        if not (_is_wanted(input) and all(gathers(norm) for norm in list(self)[1::3]) and not input.requires_grad):
            return super().forward(input)
        return Stemmed.apply(input, self, *weights_of(self))


class _FusedTransformer(Transformer):
    def forward(self, x: Tensor, draws_B2: Tensor | None = None) -> Tensor:
        if not _is_wanted(x):
            return super().forward(x, draws_B2)
        if self.can_link():
            return go_through(x, [self.link(len(x), (x.shape[2], x.shape[3]), draws_B2)])
        norm, ffn_scale_B = self.ffn_norm, _scale(self.drop, draws_B2, 1)
        x = self.attend(x, None if draws_B2 is None else draws_B2[:, 0]).permute(0, 2, 3, 1)
        return Fed.apply(x, ffn_scale_B, norm.weight, norm.bias, *weights_of_ffn(self.ffn)).permute(0, 3, 1, 2)

    def can_link(self) -> bool:
        """Whether this can be a link."""
        return _fits_attention(self.attention)

    def link(self, images: int, size: Size, draws_B2: Tensor | None) -> Link:  # noqa: ARG002  (MBConv asks for images)
        if isinstance(self.pool, Pool):
            size = (-(-size[0] // 2), -(-size[1] // 2))
        table = self.attention.weigh.bias
        bias = None if table is None else bias_by_offset(table.table, size)
        return Transformed(self, size, _scale(self.drop, draws_B2, 0), _scale(self.drop, draws_B2, 1), bias)


class _FusedFeedForward(FeedForward):
    """For blocks of another order than ours, which has more in one function."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Sequential gives it)
        if not _is_wanted(input):
            return super().forward(input)
        return Fed.apply(input[:, None], None, None, None, *weights_of_ffn(self))[:, 0]


class _FusedCoAtNet(CoAtNet):
    """The blocks of a stage are one function. With checkpoints, or where a block is to be called, each is its own."""

    def forward_stage(self, stage: nn.Module, x: Tensor, draws: Sequence[Tensor | None]) -> Tensor:
        blocks = list(stage.children())
        if not blocks or self.activation_checkpointing or not _is_wanted(x) or not _learns(x, blocks[0]):
            return super().forward_stage(stage, x, draws)
        free = [block for block in blocks if _is_free(block)]
        if len(free) < len(blocks):
            return super().forward_stage(stage, x, draws)
        links, size = list[Link](), (x.shape[2], x.shape[3])
        for block, its_draws in zip(free, draws, strict=True):
            links.append(block.link(len(x), size, its_draws))
            size = links[-1].size
        return go_through(x, links)


def _learns(x: Tensor, block: nn.Module) -> bool:
    """Whether there is a way back through a block: a chain keeps the maps of all that it goes through."""
    return x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())


def _is_free(block: nn.Module) -> TypeGuard[_FusedMBConv | _FusedTransformer]:
    """Whether a block can be a link and nobody waits for its own call: no hook, no `forward` put in its place."""
    if type(block) not in (_FusedMBConv, _FusedTransformer) or "forward" in vars(block):
        return False
    hooks = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)  # pyright: ignore
    return block.can_link() and not any(hooks) and not _has_any_global_hook()  # pyright: ignore


def _scale(drop: StochasticDepth, draws: Tensor | None, branch: int) -> Tensor | None:
    """Return what each image's branch is multiplied with, (B,) fp32; None where nothing is dropped."""
    return drop.scale(None if draws is None else draws[:, branch], torch.float32)


# (the readable class, the fused one, for which of them)
_FUSED: tuple[tuple[type[nn.Module], type[nn.Module], Callable[[Any], bool]], ...] = (
    (CoAtNet, _FusedCoAtNet, lambda _: True),
    (MBConv, _FusedMBConv, _fits),
    (ConvStem, _FusedStem, _fits_stem),
    (Transformer, _FusedTransformer, lambda block: _fits_ffn(block.ffn)),
    (FeedForward, _FusedFeedForward, _fits_ffn),
)
