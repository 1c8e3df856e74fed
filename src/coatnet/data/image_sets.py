"""Labelled pictures by index: in files below a folder, or in an array."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from coatnet.data.decode import MinSide, Pixels, decode, read_size
from coatnet.data.draws import IntArray


class ImageSet(Protocol):
    """Labelled pictures; pickled to workers, so it holds names rather than pixels where it can."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> IntArray:
        """Return the class of each picture, (N,) int64."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call a picture: its path below the data folder, or "train/123"."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) in px without decoding. Raises: BadImageError."""
        ...

    def read(self, index: int, *, min_side: int | MinSide = 0) -> Pixels:
        """Return the pixels (H, W, 3) uint8, perhaps read-only; `min_side` as in `decode`. Raises: BadImageError."""
        ...

    def take(self, rows: IntArray) -> ImageSet:
        """Return the pictures of these indices, in their order."""
        ...


class ShownRows:
    """What the sets share of which some rows are shown; they are frozen dataclasses with these fields."""

    labels: IntArray  # (M,) int64, the class of every row
    rows: IntArray  # (N,) int64, those shown, in order

    @property
    def targets(self) -> IntArray:
        return self.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: IntArray) -> Self:
        """Return the set with these of the rows that it shows."""
        return replace(self, rows=self.rows[rows])  # pyright: ignore[reportArgumentType, reportReturnType]


@dataclass(frozen=True)
class FolderImages:
    """Image files below a folder."""

    folder: Path
    names: tuple[str, ...]  # relative to the folder, with /
    targets: IntArray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def path(self, index: int) -> Path:
        """Return the file of a picture."""
        return self.folder / self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self.path(index))

    def read(self, index: int, *, min_side: int | MinSide = 0) -> Pixels:
        return decode(self.path(index), min_side=min_side)

    def take(self, rows: IntArray) -> FolderImages:
        names = tuple(self.names[row] for row in rows.tolist())
        return FolderImages(self.folder, names, self.targets[rows], self.class_names)


@dataclass(frozen=True)
class ArrayImages(ShownRows):
    """Pictures in memory, of which `rows` are shown."""

    pixels: Pixels  # (M, H, W) grey or (M, H, W, 3), uint8
    labels: IntArray  # (M,) int64
    class_names: tuple[str, ...]
    part: str  # names are "part/row"
    rows: IntArray  # (N,) int64

    def name(self, index: int) -> str:
        return f"{self.part}/{self.rows[index]}"

    def size(self, index: int) -> tuple[int, int]:  # noqa: ARG002 - all are of one size
        return self.pixels.shape[1], self.pixels.shape[2]

    def read(self, index: int, *, min_side: int | MinSide = 0) -> Pixels:  # noqa: ARG002 - there is nothing to shrink
        pixels = self.pixels[self.rows[index]]
        return pixels if pixels.ndim == 3 else np.broadcast_to(pixels[:, :, None], (*pixels.shape, 3))
