"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): found on this machine, or fetched once and checked.

70,000 grey pictures of 28 x 28 px in ten classes, 60,000 for training and 10,000 for the test. MIT licence.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from coatnet.data.decode import Pixels
from coatnet.data.draws import IntArray
from coatnet.data.image_sets import ArrayImages
from coatnet.errors import DataError
from coatnet.files import sha256_of, write_atomic

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}  # of the .gz files
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
HOMES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # the SHA-256 vouches for it
)
_TIMEOUT_S = 30
_FILE_PREFIX = {"train": "train", "test": "t10k"}


def find() -> Path:
    """Return the folder with the four files, fetching them into the cache if they are nowhere. Raises: DataError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coatnet" / "fashion-mnist"
    for folder in (SYSTEM_FOLDER, cache):
        if all((folder / name).is_file() for name in SHA256):
            return folder
    for name in SHA256:
        if not (cache / name).is_file():
            _fetch(name, cache)
    return cache


def _fetch(name: str, folder: Path) -> None:
    """Download one file, check it, and only then put it in its place."""
    met = ""
    for home in HOMES:
        try:
            with urllib.request.urlopen(home + name, timeout=_TIMEOUT_S) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:  # the latter: cut off in the middle
            met = f"{home}: {getattr(error, 'reason', error)}"
            continue
        if hashlib.sha256(content).hexdigest() == SHA256[name]:
            write_atomic(folder / name, content)
            return
        met = f"{home}: {name} came with another SHA-256 than the data set's"
    raise DataError(
        f"fashion-mnist is not on this machine and could not be fetched ({met}). Install Debian's package "
        f"dataset-fashion-mnist, put the four .gz files into {folder}, or unpack a part of it with "
        "`python -m coatnet.data.embedded FOLDER`."
    )


@lru_cache(maxsize=2)
def load(folder: Path, part: str) -> tuple[Pixels, IntArray]:
    """Read "train" or "test" -> pictures (M, 28, 28) uint8 and labels (M,) int64. Raises: DataError."""
    prefix = _FILE_PREFIX[part]
    pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
    return pixels, labels.astype(np.int64)


def _read_idx(path: Path, num_dims: int) -> Pixels:
    """Read a gzipped IDX file: two zero bytes, the type (8: uint8), the number of sizes, the sizes, the values."""
    try:
        intact = sha256_of(path) == SHA256[path.name]
        content = gzip.decompress(path.read_bytes()) if intact else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not intact:
        raise DataError(f"{path} is damaged (its SHA-256 is not the data set's). Delete it and run again.")
    sizes = np.frombuffer(content, dtype=">i4", count=num_dims, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(sizes)


def images(folder: Path, part: str, rows: IntArray | None = None) -> FashionMnistImages:
    """Return these rows of "train" or "test", or all."""
    pixels, labels = load(folder, part)
    shown = np.arange(len(labels)) if rows is None else rows
    return FashionMnistImages(pixels, labels, CLASS_NAMES, part, shown)


class FashionMnistImages(ArrayImages):
    """Pictures that a worker reads from the files again: 47 MB need not go through a pipe."""

    def __reduce__(self) -> tuple[Callable[..., FashionMnistImages], tuple[Path, str, IntArray]]:
        return images, (find(), self.part, self.rows)
