from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from coatnet.data import digits
from coatnet.data.sources import open_data
from coatnet.errors import ConfigError


def test_digits_are_scikit_learns_divided_once_and_for_all():
    data = open_data("digits", holdout_percent=None)
    assert (len(data.train) + len(data.test), len(data.class_names)) == (1797, 10)
    assert 330 <= len(data.test) <= 390, f"{len(data.test)} of 1797 are test, a fifth would be 359"
    assert not set(data.train.rows) & set(data.test.rows)
    assert [data.test.name(index) for index in range(4)] == ["test/6", "test/9", "test/12", "test/21"]
    assert np.bincount(data.test.targets).min() > 20, "a class is hardly in test"


def test_digits_keep_pixels_and_labels():
    data, source = open_data("digits").test, load_digits()
    row = data.rows[5]
    np.testing.assert_array_equal((data.read(5)[:, :, 0] / 255 * 16).round(), source.images[row])
    assert data.targets.tolist() == source.target[data.rows].tolist()
    assert (data.pixels.min(), data.pixels.max(), data.pixels.dtype) == (0, 255, np.uint8)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'coatnet\[studies\]'"):
        open_data("digits")
