"""Rows of a plan and the memory they work in: what `coatnet.native` carries out, in the order of the network."""

# The parts of a module are Tensor | Module to the checker, whatever they are.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.fast.calibration import Range8
from coatnet.fast.packing import TORCH_TYPES, Packed, Packing

OVERREAD = 64  # bytes that a vector may reach beyond the last value
CACHE_LINE, ALIAS = 64, 4096  # bytes; pixels a multiple of ALIAS apart share one set of the first cache


@dataclass(frozen=True, slots=True)
class Map:
    """A batch of maps in memory: (images, lines, cells, channels), and the range where it is in 8 bits."""

    data: Tensor
    range8: Range8 | None = None

    @property
    def type(self) -> str:
        return next(name for name, dtype in TORCH_TYPES.items() if dtype == self.data.dtype)

    @property
    def pixel_bytes(self) -> int:
        return self.data.stride(2) * self.data.element_size()


class Rows(ABC):
    """The operations for a batch of one shape, and their buffers. Those who write them close them with `_close`."""

    ops: ctypes.Array[native.Op]

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.rows: list[dict[str, int]] = []
        self.kept: list[Tensor] = []  # whatever the rows point into
        self.scratch: dict[str, Tensor] = {}

    @abstractmethod
    def run(self, given: Tensor, out: Tensor, num_threads: int) -> None:
        """Carry the rows out, from what is given into `out`, both float32 and the latter contiguous."""

    def _close(self) -> None:
        self.ops = (native.Op * len(self.rows))(*(native.Op(**row) for row in self.rows))

    # The rows that several plans have

    def _product(
        self,
        name: str,
        source: Map,
        module: nn.Module,
        *,
        into: nn.Module | None = None,
        residual: Map | None = None,
        weights: Packed | None = None,
        unfolded: bool = False,
        out: Map | None = None,
        part: int = 0,
    ) -> Map:
        """Multiply, then GELU where another product or convolution follows: `into`, which may take 8 bits.

        What goes into a 3x3 convolution gets a border of one pixel of zeros. The result lies in `out`, where that is
        given, or where the residual does. `part` steps of K are summed by themselves, if it is more than 0.
        """
        count, in_lines, in_cells, channels = source.data.shape
        packed = weights or self.packing.product(module, source.type)
        segments, stride = (1, 1) if unfolded or isinstance(module, nn.Linear) else (packed.segments, module.stride[0])
        size = tuple(-(-(cells - segments + 1) // stride) for cells in (in_lines, in_cells))
        range8 = self.packing.range_into(into) if into is not None else None
        border = 1 if isinstance(into, nn.Conv2d) and into.groups == 1 and into.kernel_size[0] == 3 else 0
        num_out = module.weight.shape[0]
        into_product = isinstance(into, nn.Linear)
        shape = (count, *size, num_out)
        out = out or residual or self._map(name, shape, self._type(range8), range8, border, spread=into_product)
        images, lines, cells = count, *size
        if stride == 1 and segments == 1 and border == 0:  # pixel after pixel, whatever line or image they are of
            images, lines, cells = (images, 1, lines * cells) if weights else (1, 1, images * lines * cells)
        line_bytes, out_line_bytes = (made.data.shape[2] * made.pixel_bytes for made in (source, out))
        self._add(
            "PRODUCT", source, out.data[:, border:, border:], images=images, lines=lines, cells=cells, width=num_out,
            range8=out.range8, depth=channels * segments, segments=segments, segment_stride=line_bytes,
            source_image=in_lines * line_bytes, source_line=line_bytes * stride,
            source_cell=source.pixel_bytes * stride, out_image=out.data.shape[1] * out_line_bytes,
            out_line=out_line_bytes, out_cell=out.pixel_bytes, weight=packed.data, bias=packed.bias, scale=packed.scale,
            weight_image=packed.data[0].nbytes if weights else 0, act=native.ACTS["LINEAR" if into is None else "GELU"],
            residual=residual.data if residual else 0, part=part,
        )  # fmt: skip
        return out

    def _norm(self, norm: nn.Module, source: Map, range8: Range8 | None = None) -> Map:
        _, lines, cells, channels = source.data.shape
        out = self._map("normed", source.data.shape, self._type(range8), range8)
        self._add(
            "NORM", source, out.data, lines=lines, cells=cells, width=channels, scale=self._keep(norm.weight),
            bias=self._keep(norm.bias), range8=range8,
        )  # fmt: skip
        return out

    # Memory and rows

    def _type(self, range8: Range8 | None) -> str:
        return "UINT8" if range8 is not None else self.packing.type

    def _map(
        self,
        name: str,
        shape: tuple[int, ...],
        type_: str,
        range8: Range8 | None = None,
        border: int = 0,
        *,
        spread: bool = False,
    ) -> Map:
        """Return a map (images, lines, cells, channels) within a border of so many pixels.

        It is `spread` where only products read it, which take any stride.
        """
        dtype = TORCH_TYPES[type_]
        images, lines, cells, channels = shape
        apart = CACHE_LINE // dtype.itemsize if spread and channels * dtype.itemsize % ALIAS == 0 else 0
        bordered = (images, lines + 2 * border, cells + 2 * border, channels + apart)
        data = self._buffer(name, bordered, dtype)[..., :channels]
        if border:
            data.copy_(range8.zero if range8 else torch.zeros(()))
        return Map(data, range8)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory that the next request by the same name overwrites: what is warm in the caches stays so."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self.scratch or len(self.scratch[name]) < num_bytes:
            self.scratch[name] = self._keep(torch.empty(num_bytes + OVERREAD, dtype=torch.uint8))
        return self.scratch[name][:num_bytes].view(dtype).view(shape)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Hold what a row points to, as the kernels read it: contiguous."""
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1]

    def _add(
        self, kind: str, source: Map, out: Tensor, *, range8: Range8 | None = None, **fields: Tensor | int
    ) -> None:
        """Add a row that turns one map into another."""
        if range8 is not None:
            fields["out_scale"], fields["out_zero"] = self._keep(1 / range8.step), self._keep(range8.zero)
        out_type = next(name for name, dtype in TORCH_TYPES.items() if dtype == out.dtype)
        fields = {"images": len(source.data), **fields}
        self._row(
            kind, type=native.TYPES[source.type], out_type=native.TYPES[out_type], source=source.data, out=out, **fields
        )

    def _row(self, kind: str, **fields: Tensor | int | str) -> None:
        """Add a row; tensors stand for their addresses, names of types for their numbers."""
        values = {
            name: value.data_ptr()
            if isinstance(value, Tensor)
            else native.TYPES[value]
            if isinstance(value, str)
            else value
            for name, value in fields.items()
        }
        self.rows.append({"kind": native.KINDS[kind], **values})
