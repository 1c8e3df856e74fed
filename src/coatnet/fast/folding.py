"""The network with everything folded that inference does not need apart: no BatchNorm is left.

Each BatchNorm is a factor and a shift by channel. It folds exactly into the convolution before it, or, before a 1x1
convolution (which pads nothing), into the one after it. The sums are made in float64.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from coatnet.model.listing import ListingMBConv
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet


@torch.no_grad()
def fold(network: CoAtNet) -> CoAtNet:
    """Return a float32 copy on the CPU's or the network's device, in evaluation, with every BatchNorm folded away."""
    folded = deepcopy(network).float().eval().requires_grad_(False)
    _fold_sequence(folded.s0)
    for block in folded.blocks:
        if isinstance(block, MBConv) and isinstance(block.norm, nn.BatchNorm2d):
            assert isinstance(block.expand_norm, nn.BatchNorm2d)
            assert isinstance(block.depthwise_norm, nn.BatchNorm2d)
            block.expand = _before(_after(block.norm, block.expand), block.expand_norm)
            block.depthwise = _before(block.depthwise, block.depthwise_norm)
            block.norm = block.expand_norm = block.depthwise_norm = nn.Identity()
        elif isinstance(block, ListingMBConv):
            for name in ("expand", "depthwise", "shrink"):
                conv, norm = block.get_submodule(name), block.get_submodule(f"{name}_norm")
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(norm, nn.BatchNorm2d)
                block.set_submodule(name, _before(conv, norm))
                block.set_submodule(f"{name}_norm", nn.Identity())
    return folded.float()


def _fold_sequence(stem: nn.Module) -> None:
    """Fold each BatchNorm of the stem into the convolution before it."""
    for name, norm in list(stem.named_children()):
        if isinstance(norm, nn.BatchNorm2d):
            before = str(int(name) - 1)
            conv = stem.get_submodule(before)
            assert isinstance(conv, nn.Conv2d)
            stem.set_submodule(before, _before(conv, norm))
            stem.set_submodule(name, nn.Identity())


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return what a BatchNorm does in evaluation: factor and shift by channel, float64."""
    state = {name: value.double() for name, value in norm.state_dict().items()}
    factor = state["weight"] * (state["running_var"] + norm.eps).rsqrt()
    return factor, state["bias"] - state["running_mean"] * factor


def _before(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a BatchNorm into the convolution before it."""
    factor, shift = _affine(norm)
    return _with(conv, conv.weight.double() * factor[:, None, None, None], _bias(conv) * factor + shift)


def _after(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """Fold a BatchNorm into the 1x1 convolution after it."""
    factor, shift = _affine(norm)
    weight = conv.weight.double()
    return _with(conv, weight * factor[:, None, None], _bias(conv) + weight.flatten(1) @ shift)


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is not None:
        return conv.bias.double()
    return conv.weight.new_zeros(conv.out_channels, dtype=torch.float64)


def _with(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution of the same geometry with these weights, in float64 so that a second fold loses nothing."""
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride), conv.padding,  # pyright: ignore[reportArgumentType]
        groups=conv.groups, device=weight.device, dtype=torch.float64,
    )  # fmt: skip
    made.weight.copy_(weight)
    assert made.bias is not None
    made.bias.copy_(bias)
    return made.requires_grad_(False)


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    return sides[0], sides[1]
