"""scikit-learn's digits: 1,797 grey pictures of 8 x 8 px in ten classes, a task of seconds.

They come with scikit-learn itself, from the UCI archive's "Optical Recognition of Handwritten Digits" (its test part).
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from coatnet.data.decode import Pixels
from coatnet.data.draws import IntArray
from coatnet.data.image_sets import ArrayImages
from coatnet.errors import ConfigError

CLASS_NAMES = tuple("0123456789")
_SIDE = 8  # px
_MAX_LEVEL = 16  # of ink in the original


def open_digits() -> dict[str, ArrayImages]:
    """Return train and test: a fifth of the rows is test, for good. Raises: ConfigError without scikit-learn."""
    pixels, labels = _load()
    in_test = np.array([_is_test(row) for row in range(len(labels))])
    rows = {"train": np.flatnonzero(~in_test), "test": np.flatnonzero(in_test)}
    return {part: ArrayImages(pixels, labels, CLASS_NAMES, part, shown) for part, shown in rows.items()}


def _is_test(row: int) -> bool:
    return hashlib.sha256(f"digits/{row}".encode()).digest()[0] % 5 == 0


@cache
def _load() -> tuple[Pixels, IntArray]:
    """Return pictures (1797, 8, 8) uint8 and labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "digits takes the scikit-learn package, which is not here: pip install 'coatnet[studies]'"
        ) from None
    features, labels = load_digits(return_X_y=True)
    pixels = np.asarray(features).reshape(-1, _SIDE, _SIDE) * (255 / _MAX_LEVEL)
    return np.rint(pixels).astype(np.uint8), np.asarray(labels).astype(np.int64)
