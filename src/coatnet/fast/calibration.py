"""What 8 bits have to hold: the range of every input of a product, channel by channel, on calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from coatnet.model.network import CoAtNet


@dataclass(frozen=True, slots=True)
class Range8:
    """How 8 unsigned bits stand for numbers, by channel: number = (byte - zero) * step; float32 (C,)."""

    step: Tensor
    zero: Tensor  # whole, 0 to 255: the byte that is exactly 0


Ranges = dict[str, Range8]  # by the name of the module whose input it is


def measure_ranges(folded: CoAtNet, images: Iterable[Tensor]) -> Ranges:
    """Run a folded network on batches (B, C, H, W) float32 and return the range of each product's input."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def look(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        by_channel = x.movedim(1, -1).flatten(0, -2) if x.dim() == 4 else x.flatten(0, -2)
        smallest, largest = by_channel.aminmax(dim=0)
        low[name] = torch.minimum(low.get(name, smallest), smallest)
        high[name] = torch.maximum(high.get(name, largest), largest)

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in folded.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.inference_mode():
            for batch in images:
                folded(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _range(low[name], high[name]) for name in low}


def _range(low: Tensor, high: Tensor) -> Range8:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = ((high - low) / 255).clamp(min=1e-8)
    return Range8(step, (-low / step).round())
