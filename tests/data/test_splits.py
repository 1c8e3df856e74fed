"""Keeping a share of the training pictures: of each class, by seed and name alone, the smaller within the larger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.data.image_sets import ArrayImages
from coatnet.data.sources import fingerprint, open_data
from coatnet.data.splits import keep, names_of


def images_of(labels: list[int], rows: list[int] | None = None) -> ArrayImages:
    pixels = np.zeros((len(labels), 2, 2), dtype=np.uint8)
    shown = np.arange(len(labels)) if rows is None else np.array(rows)
    return ArrayImages(pixels, np.array(labels), ("a", "b", "c"), "train", shown)


LABELS = st.lists(st.integers(0, 2), min_size=1, max_size=60)
PERCENT = st.floats(0.01, 100)


@given(LABELS, st.integers(0, 2**40), PERCENT, PERCENT)
def test_a_smaller_share_lies_in_a_larger_one(labels: list[int], seed: int, one: float, other: float):
    images = images_of(labels)
    small, large = (names_of(keep(images, seed, percent)) for percent in sorted((one, other)))
    assert set(small) <= set(large)
    assert names_of(keep(images, seed, 100)) == names_of(images)


@given(LABELS, st.integers(0, 2**40), PERCENT)
def test_each_class_keeps_its_share_and_at_least_one(labels: list[int], seed: int, percent: float):
    counts = np.bincount(labels, minlength=3)
    kept = np.bincount(keep(images_of(labels), seed, percent).targets, minlength=3)
    for had, has in zip(counts.tolist(), kept.tolist(), strict=True):
        assert has == (max(1, round(had * percent / 100)) if had else 0), f"{has} of {had} at {percent} %"


@given(LABELS, st.integers(0, 2**40), PERCENT, st.randoms())
def test_the_order_of_the_pictures_does_not_matter(labels: list[int], seed: int, percent: float, random):
    rows = list(range(len(labels)))
    random.shuffle(rows)
    kept = set(names_of(keep(images_of(labels, rows), seed, percent)))
    assert kept == set(names_of(keep(images_of(labels), seed, percent)))


def test_val_stays_whole_and_the_split_names_what_was_kept(make_folder):
    folder = make_folder({"ant": 40, "bee": 20})
    whole = open_data(folder)
    quarter = open_data(folder, train_percent=25)
    assert names_of(quarter.val) == names_of(whole.val), "val is another"
    assert np.bincount(quarter.train.targets).tolist() == [9, 4]
    assert names_of(quarter.train) == quarter.split["train"]
    assert set(quarter.split["train"]) < set(whole.split["train"])
    assert names_of(open_data(folder, seed=1, train_percent=25).train) != names_of(quarter.train)
    again = open_data(folder, train_percent=25, split=quarter.split)
    assert names_of(again.train) == names_of(quarter.train), "a quarter of the quarter"


def test_a_folder_that_came_divided_keeps_the_same_each_time(make_folder):
    make_folder({"ant": 20, "bee": 20}, "d/train")
    folder = make_folder({"ant": 4, "bee": 4}, "d/val").parent
    first, again = (open_data(folder, seed=5, train_percent=10) for _ in range(2))
    assert (len(first.train), len(first.val), first.split) == (4, 8, None)
    assert names_of(again.train) == names_of(first.train)


@pytest.mark.parametrize("divided", [True, False])
def test_the_fingerprint_tells_what_was_kept(divided: bool, make_folder):
    folder = make_folder({"ant": 20, "bee": 20}, "d/train")
    folder = make_folder({"ant": 4, "bee": 4}, "d/val").parent if divided else folder
    shares = [None, 50.0, 10.0]
    hashes = {fingerprint(open_data(folder, train_percent=share)) for share in shares}
    assert len(hashes) == 3
    assert fingerprint(open_data(folder, train_percent=10.0)) in hashes
