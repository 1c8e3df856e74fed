"""Many names in little memory: millions of Python's strings would be copied into every rank and worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coatnet.data.draws import IntArray


@dataclass(frozen=True)
class PackedNames:
    """N names, end to end."""

    content: NDArray[np.uint8]  # (bytes,)
    ends: IntArray  # (N,) int64, where each name ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Pack names, of any bytes that file names may hold."""
        packed = [name.encode(errors="surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in packed], dtype=np.int64)
        return cls(np.frombuffer(b"".join(packed), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes().decode(errors="surrogateescape")
