"""Labelled pictures in rows of a table that is mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatnet.data.decode import MinSide, Pixels, decode, read_size
from coatnet.data.draws import IntArray
from coatnet.data.image_sets import ShownRows
from coatnet.errors import BadImageError


@dataclass(frozen=True)
class TableImages(ShownRows):
    """Pictures in rows of a table, of which `rows` are shown. Workers map its files anew."""

    table: Any  # datasets.Dataset of the one column
    column: str
    part: str  # names are "part/row"
    folders: tuple[Path, ...]  # below which a picture may lie that the table only names
    labels: IntArray
    class_names: tuple[str, ...]
    rows: IntArray  # (N,) int64

    def name(self, index: int) -> str:
        return f"{self.part}/{self.rows[index]}"

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self._content(index), name=self.name(index))

    def read(self, index: int, *, min_side: int | MinSide = 0) -> Pixels:
        return decode(self._content(index), name=self.name(index), min_side=min_side)

    def _content(self, index: int) -> bytes | Path:
        """Return a picture's bytes, or its file where the table only names one. Raises: BadImageError."""
        cell = self.table[int(self.rows[index])][self.column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if isinstance(content, bytes):
            return content
        if not isinstance(path, str):
            raise BadImageError(f"{self.name(index)}: the row holds no picture.")
        file = Path(path).resolve()
        if not any(file.is_relative_to(folder) for folder in self.folders):
            raise BadImageError(f"{self.name(index)}: names a file outside of the data, {path}, which is not read.")
        return file
