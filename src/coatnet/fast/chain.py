"""Blocks one after the other in training, as one autograd function on the kernels. bf16.

To go into a function of autograd and out of it takes Python as long as a small kernel takes, block after block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coatnet.config import Size
from coatnet.fast.kernels import bf16_rows
from coatnet.fast.operations import Nested, leaves, nest, recorded, shape_of


class Link(ABC):
    """A block in a chain: what it learns, and its operations there and back, recorded with those of its neighbours.

    `learned` gets gradients, in its order; `options` are what else the operations depend on; `size` is its output's.
    """

    learned: Sequence[Tensor | None]
    options: Hashable
    size: Size

    @abstractmethod
    def read(self) -> tuple[Nested, Nested]:
        """Return what `there` reads beside the map, as the kernels read it: alone, and what `back` reads as well."""

    @staticmethod
    @abstractmethod
    def there(x: Tensor, alone: Nested, both: Nested, options: Any) -> tuple[Tensor, Nested]:
        """Return the output of a map (B, H, W, C) bf16, (B, h, w, D), and what the way back needs."""

    @staticmethod
    @abstractmethod
    def back(slope: Tensor, x: Tensor, kept: Nested, both: Nested, options: Any) -> tuple[Tensor, Nested]:
        """Return the gradient of x, and what `gradients` makes those of `learned` of."""

    @abstractmethod
    def gradients(self, slopes: Nested) -> Sequence[Tensor | None]:
        """Return the gradients of `learned`, each of its shape."""

    def note_pass(self) -> None:  # noqa: B027  (most have nothing to note)
        """Note that a batch went through."""


def go_through(x: Tensor, links: Sequence[Link]) -> Tensor:
    """Pass a map through a chain: (B, C, H, W) -> (B, D, h, w) bf16."""
    return _Chained.apply(x, links, *(part for link in links for part in link.learned))


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, links: Sequence[Link], *_learned: Tensor | None) -> Tensor:
        rows = bf16_rows(x.permute(0, 2, 3, 1))
        read = tuple(link.read() for link in links)
        ctx.steps = tuple((type(link), link.options) for link in links)
        made = _there(rows, read, steps=ctx.steps)
        for link in links:
            link.note_pass()
        maps = (rows, *(out for out, _ in made))
        saved = tuple((source, kept, both) for source, (_, kept), (_, both) in zip(maps[:-1], made, read, strict=True))
        ctx.shape, ctx.links, ctx.in_dtype = shape_of(saved), links, x.dtype
        ctx.save_for_backward(*leaves(saved))
        return maps[-1].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = nest(ctx.shape, iter(ctx.saved_tensors))
        x_slope, slopes = _back(bf16_rows(slope.permute(0, 2, 3, 1)), saved, steps=ctx.steps)
        found = [part for link, its in zip(ctx.links, slopes, strict=True) for part in link.gradients(its)]
        return x_slope.permute(0, 3, 1, 2).to(ctx.in_dtype), None, *found


@recorded
def _there(x: Tensor, read: Nested, *, steps: Any) -> tuple[Nested, ...]:
    """Return of each link its output and what it keeps."""
    made = list[tuple[Tensor, Nested]]()
    for (link, options), (alone, both) in zip(steps, read, strict=True):
        x, kept = link.there(x, alone, both, options)
        made.append((x, kept))
    return tuple(made)


@recorded
def _back(slope: Tensor, saved: Nested, *, steps: Any) -> tuple[Tensor, Nested]:
    """Return the gradient of the chain's input, and of each link the slopes."""
    found = list[Nested]()
    for (link, options), (x, kept, both) in zip(steps[::-1], saved[::-1], strict=True):
        slope, slopes = link.back(slope, x, kept, both, options)
        found.append(slopes)
    return slope, tuple(found[::-1])
