"""The listing's network written out plainly, as `reference.py` has the paper's; what is the same is taken from there.

Source: the listing that `src/coatnet/model/listing.py` names, block by block.
"""

# ruff: noqa: ARG002  (the listing has no stochastic depth)

from __future__ import annotations

import math

import torch
from torch import Tensor

from parity.reference import Plain, gelu, layer_norm_map


class PlainListing(Plain):
    """The network as functions of its weights by name."""

    batch_norm_eps = 1e-5

    def logits(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        x = self.maps(images, draws)[-1]
        return self.linear("classifier", x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]))

    def stem(self, images: Tensor) -> Tensor:
        x = images
        for index in range(self.config.depths[0]):
            x = self.conv(f"s0.{3 * index}", x, self.config.strides[0] if index == 0 else 1)
            x = gelu(self.norm(f"s0.{3 * index + 1}", x))
        return x

    def mbconv(self, at: str, x: Tensor, stride: int, rate: float = 0.0, draws: Tensor | None = None) -> Tensor:
        """Proj(Pool(x)) + Norm(Shrink(SE(GELU(Norm(DepthConv(GELU(Norm(Expand(x)))))))))."""
        branch = gelu(self.norm(f"{at}.expand_norm", self.conv(f"{at}.expand", x, stride)))
        branch = gelu(self.norm(f"{at}.depthwise_norm", self.depthwise(f"{at}.depthwise", branch, 1)))
        branch = self.conv(f"{at}.shrink", self.squeeze_excite(f"{at}.squeeze_excite", branch))
        return self.shortcut(at, x, stride) + self.norm(f"{at}.shrink_norm", branch)

    def squeeze_excite(self, at: str, x: Tensor) -> Tensor:
        mean = x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        return x / (1 + torch.exp(-self.conv(f"{at}.expand", gelu(self.conv(f"{at}.reduce", mean)))))

    def transformer(self, at: str, x: Tensor, stride: int, rate: float = 0.0, draws: Tensor | None = None) -> Tensor:
        """Proj(Pool(x)) + Attention(Norm(Pool(x))); then the FFN."""
        normed = layer_norm_map(pool(x) if stride == 2 else x, *self.affine(f"{at}.attention_norm"))
        x = self.shortcut(at, x, stride) + self.attention(f"{at}.attention", normed)
        tokens = layer_norm_map(x, *self.affine(f"{at}.ffn_norm")).flatten(2).transpose(1, 2)
        fed = self.linear(f"{at}.ffn.2", gelu(self.linear(f"{at}.ffn.0", tokens)))
        return x + fed.transpose(1, 2).unflatten(2, x.shape[2:])

    def shortcut(self, at: str, x: Tensor, stride: int) -> Tensor:
        x = pool(x) if stride == 2 else x
        return self.conv(f"{at}.project", x) if f"{at}.project.weight" in self.weights else x


def pool(x: Tensor) -> Tensor:
    """Return the largest of the 3 x 3 cells around each second one; at an edge, of those that are there."""
    rows, columns = math.ceil(x.shape[2] / 2), math.ceil(x.shape[3] / 2)
    out = [
        x[:, :, max(0, 2 * row - 1) : 2 * row + 2, max(0, 2 * column - 1) : 2 * column + 2].amax(dim=(2, 3))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(out, dim=2).unflatten(2, (rows, columns))
