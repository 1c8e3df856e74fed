"""A folded network's weights as the kernels of `coatnet.native` read them."""

# The parts of a module are Tensor | Module to the checker, whatever they are.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.config import Precision, Size
from coatnet.fast.calibration import Range8, Ranges
from coatnet.model.attention import resize_table
from coatnet.model.network import CoAtNet

PANEL = 32  # columns of packed weights side by side (native/product.h)
TORCH_TYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "UINT8": torch.uint8}
PER_STEP = {"FP32": 1, "BF16": 2, "UINT8": 4}  # values of K in 32 bits


def gates_the_map(pixels: int, width: int) -> bool:
    """Whether squeeze-excite's gates scale less in a map of so many pixels than in a product's weights so wide."""
    return pixels < width


@dataclass(frozen=True, slots=True)
class Packed:
    """The weights of a product as the kernels read them."""

    data: Tensor
    bias: Tensor
    scale: Tensor
    segments: int


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A folded network's weights in one precision, packed once and shared by the plans for all sizes."""

    network: CoAtNet
    precision: Precision
    ranges: Ranges
    made: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names.update({id(module): name for name, module in self.network.named_modules()})

    @property
    def type(self) -> str:
        """What maps are kept in where they are not in 8 bits."""
        return "FP32" if self.precision == "fp32" else "BF16"

    def range_into(self, module: nn.Module) -> Range8 | None:
        """Return the range of a module's input, if it is to come in 8 bits."""
        return self.ranges[self.names[id(module)]] if self.precision == "int8" else None

    def keep(self, key: str, make: Any) -> Any:
        """Return what was made under this key, making it once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def product(self, module: nn.Module, type_: str) -> Packed:
        """Return the weights of a linear layer or convolution, for inputs of this type."""
        range8 = self.range_into(module) if type_ == "UINT8" else None
        return self.keep(f"product {self.names[id(module)]}", lambda: _pack_module(module, type_, range8))


def _pack_module(module: nn.Module, type_: str, range8: Range8 | None) -> Packed:
    weight, bias = module.weight.detach(), module.bias.detach()
    segments = weight.shape[2] if weight.dim() == 4 else 1
    by_output = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
    per_step = PER_STEP[type_]
    rows_KN = nn.functional.pad(by_output.T, (0, 0, 0, -by_output.shape[1] % per_step))
    ones = torch.ones(rows_KN.shape[1])
    if type_ != "UINT8":
        return Packed(pack(rows_KN, type_), padded(bias), padded(ones), segments)
    assert range8 is not None, "8 bits without a range"
    repeats = rows_KN.shape[0] // len(range8.step)
    rows_KN = rows_KN * range8.step.repeat(repeats)[:, None]
    step_N = rows_KN.abs().amax(dim=0).clamp(min=1e-20) / 127
    whole_KN = (rows_KN / step_N).round()
    bias = bias - step_N * (range8.zero.repeat(repeats) @ whole_KN)
    return Packed(pack(whole_KN, type_), padded(bias), padded(step_N), segments)


def padded(by_column: Tensor) -> Tensor:
    return nn.functional.pad(by_column.float(), (0, -len(by_column) % PANEL)).contiguous()


def panels(rows_KN: Tensor) -> Tensor:
    """Cut the columns into panels: (K, N) -> (P, K, 32), zeros beyond the last."""
    padded = nn.functional.pad(rows_KN, (0, -rows_KN.shape[1] % PANEL))
    return padded.unflatten(1, (-1, PANEL)).movedim(1, 0).contiguous()


def pack(rows_KN: Tensor, type_: str) -> Tensor:
    """(K, N) -> (P, K / step, 32, step) in the type, int8 for the products of 8 bits."""
    per_step = PER_STEP[type_]
    stepped = panels(rows_KN).unflatten(1, (-1, per_step)).transpose(2, 3)
    return stepped.to(torch.int8 if type_ == "UINT8" else TORCH_TYPES[type_]).contiguous()


def bias_by_offset(table: Tensor, grid: Size) -> Tensor:
    """Return each head's biases for a grid (H, W) by the key's offset from the query: (M, 2H-1, 2W-1)."""
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    return resize_table(table, size).flip(1, 2).float()
