from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes class folders of small PNGs, each of one colour of its own."""

    def make(counts: dict[str, int], below: str = "pictures") -> Path:
        number = 0
        for class_name, count in counts.items():
            folder = tmp_path / below / class_name
            folder.mkdir(parents=True)
            for index in range(count):
                number += 1
                pixels = np.full((8, 10, 3), (number, 255 - number, 7), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        return tmp_path / below

    return make
