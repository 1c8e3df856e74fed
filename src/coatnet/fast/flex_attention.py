"""Attention on CUDA as one kernel: torch's FlexAttention reads the learned bias by offset, and gives its gradient.

Neither the logits (B, M, N, N) nor the laid-out bias (M, N, N) is ever in memory. It pays only compiled: outside
`torch.compile`, in fp32, and on every other machine the readable attention computes. Source: arXiv 2412.05496.
"""

# B batch, N tokens (H*W), M heads, D head dim, O offsets (2H-1)*(2W-1)

from __future__ import annotations

import torch
from torch import Tensor

from coatnet.config import Size
from coatnet.model.attention import Attention, join_heads, resize_table
from coatnet.model.network import CoAtNet

HEAD_DIMS = (32, 64, 128)  # of the paper's rows, and what the kernel's tiles are made for
DTYPES = (torch.bfloat16, torch.float16)


def use_flex_attention(network: CoAtNet) -> CoAtNet:
    """Give the network's attention, in place, the class that is one kernel on CUDA; weights and names stay."""
    for module in network.modules():
        if type(module) is Attention and _fits(module):
            module.__class__ = FlexAttention  # what a copy or a checkpoint sees is the same module
    return network


def _fits(attention: Attention) -> bool:
    head_dim = attention.project.in_features // attention.num_heads
    return attention.weigh.relative != "post" and head_dim in HEAD_DIMS


class FlexAttention(Attention):
    """The readable attention, computed by `attend` where that pays."""

    def mix(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Size) -> Tensor:
        if not _is_wanted(q_BMND):
            return super().mix(q_BMND, k_BMND, v_BMND, grid)
        table = None if self.weigh.bias is None else self.weigh.bias.table
        return join_heads(attend(q_BMND, k_BMND, v_BMND, table, grid))


def _is_wanted(q_BMND: Tensor) -> bool:
    """Whether this is being compiled for CUDA in a precision of half the bits."""
    return (
        q_BMND.is_cuda
        and q_BMND.dtype in DTYPES
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
    )


def attend(q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, table: Tensor | None, grid: Size) -> Tensor:
    """Return softmax(q k / sqrt(D) + bias) v, (B, M, N, D); the table (M, 2H-1, 2W-1) fits any grid as in training."""
    from torch.nn.attention.flex_attention import flex_attention

    height, width = grid
    columns = 2 * width - 1
    centre = (height - 1) * columns + width - 1  # where the offset is 0

    def place(token: Tensor) -> Tensor:
        """Return where a token lies on a map as wide as the table, so that differences of places are offsets."""
        return token // width * columns + token % width

    table_MO = None if table is None else resize_table(table, (2 * height - 1, columns)).flatten(1)

    def biased(score: Tensor, _image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert table_MO is not None
        return score + table_MO[head, place(query) - place(key) + centre]

    return flex_attention(
        q_BMND, k_BMND, v_BMND, score_mod=None if table_MO is None else biased,
        # Every query sees every key: no row is empty, and blocks follow each other. Its form for short queries is not
        # taken, since it is made for decoding.
        kernel_options={"BACKEND": "TRITON", "ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True},
    )  # fmt: skip
