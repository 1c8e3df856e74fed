"""CoAtNet written out plainly from the paper's equations, to hold the package's network against.

Nothing here is shared with the package but its configs and the names of its weights. Convolutions are sums over taps,
attention is one product per head with P[i - j] looked up by loops, windows are a mask over all tokens. It runs in the
dtype of the weights it is given. Source: arXiv 2106.04803 section 2.1 and appendix A.1, as listed in docs/paper.md.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from coatnet.config import ModelConfig

Weights = dict[str, Tensor]


class Plain:
    """The network as functions of its weights by name; `training` uses and moves BatchNorm's statistics."""

    batch_norm_eps = 1e-3

    def __init__(self, config: ModelConfig, weights: Weights, *, training: bool) -> None:
        self.config = config
        self.weights = weights
        self.training = training

    # The whole.

    def logits(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        x = self.maps(images, draws)[-1]
        x = x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
        x = self.linear("pre_logits", layer_norm(x, *self.affine("norm")))
        return self.linear("classifier", torch.tanh(x))

    def maps(self, images: Tensor, draws: Tensor | None = None) -> list[Tensor]:
        """Return the maps of S0 .. S4; `draws` (B, branches) are stochastic depth's, one column a branch in order."""
        maps = [self.stem(images)]
        kinds = self.block_kinds()
        total = sum(len(stage) for stage in kinds)
        met, column = 0, 0
        for number, stage in enumerate(kinds, start=1):
            x = maps[-1]
            for index, kind in enumerate(stage):
                opens = index == 0 and self.config.layout != "vit_rel"
                stride = self.config.strides[number] if opens else 1
                rate = self.config.stochastic_depth_rate * met / total
                branches = 1 if kind == "C" else 2
                own = None if draws is None else draws[:, column : column + branches]
                block = self.mbconv if kind == "C" else self.transformer
                x = block(f"s{number}.{index}", x, stride, rate, own)
                met, column = met + 1, column + branches
            maps.append(x)
        return maps

    def block_kinds(self) -> list[str]:
        """Return the kinds of the blocks of S1 .. S4, such as "CC", "CCC", "TTTTT", "TT"."""
        config = self.config
        if config.layout == "vit_rel":
            depth = config.depths[0]
            ends = [depth * quarter // 4 for quarter in range(5)]
            return ["T" * (ends[stage] - ends[stage - 1]) for stage in (1, 2, 3, 4)]
        kinds = [kind * depth for kind, depth in zip(config.layout, config.depths[1:], strict=True)]
        if config.s3_mbconv is not None:
            kinds[2] = "C" * config.s3_mbconv[0] + kinds[2]
        return kinds

    def stem(self, images: Tensor) -> Tensor:
        if self.config.layout == "vit_rel":
            return self.patches(images)
        x = self.conv("s0.0", images, self.config.strides[0])
        for index in range(1, self.config.depths[0]):
            x = self.conv(f"s0.{3 * index}", gelu(self.norm(f"s0.{3 * index - 2}", x)))
        return x

    def patches(self, images: Tensor) -> Tensor:
        side = self.config.patch_size
        weight, bias = self.weights["s0.project.weight"], self.weights["s0.project.bias"]
        rows, columns = math.ceil(images.shape[2] / side), math.ceil(images.shape[3] / side)
        out = []
        for row in range(rows):
            for column in range(columns):
                patch = images[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                taps = weight[:, :, : patch.shape[2], : patch.shape[3]]
                out.append(torch.einsum("bchw,dchw->bd", patch, taps) + bias)
        return torch.stack(out, dim=2).unflatten(2, (rows, columns))

    # The blocks.

    def mbconv(self, at: str, x: Tensor, stride: int, rate: float = 0.0, draws: Tensor | None = None) -> Tensor:
        """Proj(Pool(x)) + Shrink(SE(GELU(Norm(DepthConv(GELU(Norm(Expand(Norm(x))))))))), Eq. 5."""
        expand_stride, depthwise_stride = (stride, 1) if self.config.stride_in == "expand" else (1, stride)
        branch = self.conv(f"{at}.expand", self.norm(f"{at}.norm", x), expand_stride)
        branch = gelu(self.norm(f"{at}.expand_norm", branch))
        branch = self.depthwise(f"{at}.depthwise", branch, depthwise_stride)
        branch = gelu(self.norm(f"{at}.depthwise_norm", branch))
        branch = self.conv(f"{at}.shrink", self.squeeze_excite(f"{at}.squeeze_excite", branch))
        return self.shortcut(at, x, stride) + self.keep(branch, rate, None if draws is None else draws[:, 0])

    def squeeze_excite(self, at: str, x: Tensor) -> Tensor:
        mean = x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        squeezed = self.conv(f"{at}.reduce", mean)
        gate = self.conv(f"{at}.expand", squeezed / (1 + torch.exp(-squeezed)))
        return x / (1 + torch.exp(-gate))

    def transformer(self, at: str, x: Tensor, stride: int, rate: float = 0.0, draws: Tensor | None = None) -> Tensor:
        """Proj(Pool(x)) + Attention(Pool(Norm(x))), Eq. 4; then the same with the FFN, which never pools."""
        normed = layer_norm_map(x, *self.affine(f"{at}.attention_norm"))
        pooled = pool(normed) if stride == 2 else normed
        mixed = self.attention(f"{at}.attention", pooled)
        x = self.shortcut(at, x, stride) + self.keep(mixed, rate, None if draws is None else draws[:, 0])
        tokens = layer_norm_map(x, *self.affine(f"{at}.ffn_norm")).flatten(2).transpose(1, 2)
        fed = self.linear(f"{at}.ffn.2", gelu(self.linear(f"{at}.ffn.0", tokens)))
        fed = fed.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.keep(fed, rate, None if draws is None else draws[:, 1])

    def attention(self, at: str, x: Tensor) -> Tensor:
        """y_i = sum_j softmax_j(x_i x_j + P[i - j]) x_j, Eq. 3, head by head."""
        config, grid = self.config, (x.shape[2], x.shape[3])
        q, k, v = self.linear(f"{at}.qkv", x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # (B, N, D) each
        out = []
        for head in range(q.shape[-1] // config.head_dim):
            own = slice(head * config.head_dim, (head + 1) * config.head_dim)
            weights = self.attention_weights(at, head, q[..., own], k[..., own], grid)
            out.append(torch.einsum("bij,bjd->bid", weights, v[..., own]))
        return self.linear(f"{at}.project", torch.cat(out, dim=-1)).transpose(1, 2).unflatten(2, grid)

    def attention_weights(self, at: str, head: int, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, N, N) of one head: q, k (B, N, head_dim)."""
        config = self.config
        if config.attention == "linear":
            weights = torch.einsum("bid,bjd->bij", elu_plus_one(q), elu_plus_one(k))
            return weights / weights.sum(dim=-1, keepdim=True)
        logits = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(config.head_dim)
        seen = visible(grid, config.window_size if config.attention == "window" else None)
        bias = torch.zeros((), dtype=q.dtype)
        if config.relative_attention != "none":
            bias = self.bias(f"{at}.weigh.bias.table", head, grid)
        if config.relative_attention == "pre":
            logits = logits + bias
        raised = torch.where(seen, torch.exp(logits - logits.max(dim=-1, keepdim=True).values), 0.0)
        weights = raised / raised.sum(dim=-1, keepdim=True)
        return torch.where(seen, weights + bias, 0.0) if config.relative_attention == "post" else weights

    def bias(self, name: str, head: int, grid: tuple[int, int]) -> Tensor:
        """Return P[i - j] for every query i and key j: (N, N)."""
        table, side = self.weights[name][head], None
        if self.config.attention == "window":
            side = self.config.window_size
        else:
            table = resize_bilinear(table, (2 * grid[0] - 1, 2 * grid[1] - 1))
        rows, columns = offset_index(grid, side)
        return table[rows, columns].view(len(cells(grid)), len(cells(grid)))

    def shortcut(self, at: str, x: Tensor, stride: int) -> Tensor:
        x = pool(x) if stride == 2 else x
        projection = f"{at}.shortcut.{int(stride == 2)}"
        return self.conv(projection, x) if f"{projection}.weight" in self.weights else x

    def keep(self, branch: Tensor, rate: float, draw: Tensor | None) -> Tensor:
        """Drop the branch of each sample whose draw is below the rate, and scale the others up."""
        if draw is None or not self.training or rate == 0:
            return branch
        samples = [x / (1 - rate) if u >= rate else x * 0 for x, u in zip(branch, draw.tolist(), strict=True)]
        return torch.stack(samples)

    # The layers.

    def affine(self, at: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{at}.weight"], self.weights[f"{at}.bias"]

    def linear(self, at: str, x: Tensor) -> Tensor:
        y = torch.einsum("...c,dc->...d", x, self.weights[f"{at}.weight"])
        return y + self.weights[f"{at}.bias"] if f"{at}.bias" in self.weights else y

    def conv(self, at: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{at}.weight"]
        y = torch.zeros((), dtype=x.dtype)
        for tap, shifted in taps(x, weight.shape[-1], stride):
            y = y + torch.einsum("bchw,dc->bdhw", shifted, weight[:, :, *tap])
        return y + self.weights[f"{at}.bias"][:, None, None] if f"{at}.bias" in self.weights else y

    def depthwise(self, at: str, x: Tensor, stride: int) -> Tensor:
        weight = self.weights[f"{at}.weight"]
        y = torch.zeros((), dtype=x.dtype)
        for tap, shifted in taps(x, 3, stride):
            y = y + shifted * weight[:, 0, *tap][:, None, None]
        return y

    def norm(self, at: str, x: Tensor) -> Tensor:
        """BatchNorm, or LayerNorm over the channels where the weights hold no running statistics."""
        if f"{at}.running_mean" not in self.weights:
            return layer_norm_map(x, *self.affine(at))
        mean, var = self.weights[f"{at}.running_mean"], self.weights[f"{at}.running_var"]
        if self.training:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            batch_mean = x.sum(dim=(0, 2, 3)) / count
            batch_var = ((x - batch_mean[:, None, None]) ** 2).sum(dim=(0, 2, 3)) / count
            share = self.config.batch_norm_momentum
            self.weights[f"{at}.running_mean"] = (1 - share) * mean + share * batch_mean.detach()
            unbiased = batch_var.detach() * (count / (count - 1))
            self.weights[f"{at}.running_var"] = (1 - share) * var + share * unbiased
            mean, var = batch_mean, batch_var
        weight, bias = self.affine(at)
        scale = weight / torch.sqrt(var + self.batch_norm_eps)
        return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]


def taps(x: Tensor, kernel: int, stride: int) -> list[tuple[tuple[int, int], Tensor]]:
    """Return each place (row, column) of a kernel with the cells it meets, zeros beyond the edge, ceil(n / stride)."""
    beyond = kernel // 2
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * beyond, x.shape[3] + 2 * beyond, dtype=x.dtype)
    padded[:, :, beyond : beyond + x.shape[2], beyond : beyond + x.shape[3]] = x
    return [
        ((row, column), padded[:, :, row : row + x.shape[2] : stride, column : column + x.shape[3] : stride])
        for row in range(kernel)
        for column in range(kernel)
    ]


def pool(x: Tensor) -> Tensor:
    """Return the largest of each 2 x 2 cells; at an odd edge, of those that are there."""
    rows, columns = math.ceil(x.shape[2] / 2), math.ceil(x.shape[3] / 2)
    out = [
        x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].amax(dim=(2, 3))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(out, dim=2).unflatten(2, (rows, columns))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.sum(dim=-1, keepdim=True) / x.shape[-1]
    var = (centred**2).sum(dim=-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt(var + 1e-5) * weight + bias


def layer_norm_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def same_window(i: tuple[int, int], j: tuple[int, int], side: int) -> bool:
    return (i[0] // side, i[1] // side) == (j[0] // side, j[1] // side)


@cache
def visible(grid: tuple[int, int], side: int | None) -> Tensor:
    """Return which key each query sees, (N, N): all, or those in its own window."""
    return torch.tensor([[side is None or same_window(i, j, side) for j in cells(grid)] for i in cells(grid)])


@cache
def offset_index(grid: tuple[int, int], side: int | None) -> tuple[list[int], list[int]]:
    """Return row and column of P[i - j] in its table for each query i and key j; 0 for a pair that is not seen."""
    height, width = grid if side is None else (side, side)
    rows, columns = [], []
    for i in cells(grid):
        for j in cells(grid):
            inside = side is None or same_window(i, j, side)
            rows.append(i[0] - j[0] + height - 1 if inside else 0)
            columns.append(i[1] - j[1] + width - 1 if inside else 0)
    return rows, columns


def resize_bilinear(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the table (h, w) read at so many points, cell centres on cell centres, straight lines between them."""
    rows = torch.stack([_between(table, place) for place in _places(table.shape[0], size[0])])
    columns = [_between(rows.transpose(0, 1), place) for place in _places(table.shape[1], size[1])]
    return torch.stack(columns, dim=1)


def _places(old: int, new: int) -> list[float]:
    return [min(max((index + 0.5) * old / new - 0.5, 0.0), old - 1.0) for index in range(new)]


def _between(rows: Tensor, place: float) -> Tensor:
    low = min(int(place), rows.shape[0] - 1)
    high = min(low + 1, rows.shape[0] - 1)
    return rows[low] * (1 - (place - low)) + rows[high] * (place - low)
