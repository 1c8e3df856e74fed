"""Write the archive of `coatnet.data.embedded`, the same bytes each time: `python tools/embed_fashion_mnist.py`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from coatnet.data import fashion_mnist

FOLDER = Path(__file__).parents[1] / "src/coatnet/data/embedded"
NUM_PER_CLASS = {"train": 400, "test": 100}


def png(pixels: np.ndarray) -> bytes:
    """Encode one grey picture, as small as Pillow makes it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Store without compressing again, and with a fixed date."""
    archive.writestr(zipfile.ZipInfo(name, date_time=(2017, 8, 25, 0, 0, 0)), content)


def main() -> None:
    """Take the first pictures of each class, in file order."""
    source = fashion_mnist.find()
    with zipfile.ZipFile(FOLDER / "fashion_mnist_small.zip", "w", zipfile.ZIP_STORED) as archive:
        add(archive, "LICENSE.txt", (FOLDER / "LICENSE-fashion-mnist.txt").read_bytes())
        for part, count in NUM_PER_CLASS.items():
            pixels, labels = fashion_mnist.load(source, part)
            for target, class_name in enumerate(fashion_mnist.CLASS_NAMES):
                folder = class_name.replace("/", "_").replace(" ", "_")
                for row in np.flatnonzero(labels == target)[:count].tolist():
                    add(archive, f"{part}/{folder}/{row:05d}.png", png(pixels[row]))


if __name__ == "__main__":
    main()
