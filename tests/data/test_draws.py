from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.data import draws

SEEDS = st.integers(0, 2**63 - 1)


@given(seed=SEEDS, epoch=st.integers(0, 2**40), position=st.integers(0, 2**62))
def test_one_position_alone_draws_what_it_draws_among_others(seed, epoch, position):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = draws.uniforms(seed, "s", epoch, position, 3)
        among = draws.uniforms(seed, "s", epoch, np.array([5, position, 7]), 3)
    np.testing.assert_array_equal(alone[0], among[1])
    assert ((alone >= 0) & (alone < 1)).all(), f"draws outside 0 .. 1: {alone}"


def test_draws_are_what_they_were_in_the_first_release():
    found = draws.uniforms(7, "augment", 1, np.array([0, 1]), 2).round(9).tolist()
    assert found == [[0.609018627, 0.300337896], [0.892891369, 0.613841443]], (
        f"a run of the same seed would not be the same any more: {found}"
    )
    order = draws.permutation(7, 1, 8).tolist()
    assert order == [6, 4, 0, 3, 5, 2, 7, 1], f"pictures would come in another order: {order}"


def test_draws_are_uniform_and_unrelated():
    u = draws.uniforms(0, "s", 0, np.arange(20_000), 2)
    for other in (draws.uniforms(0, "t", 0, np.arange(20_000), 2), draws.uniforms(1, "s", 0, np.arange(20_000), 2),
                  draws.uniforms(0, "s", 1, np.arange(20_000), 2), np.roll(u, 1, axis=0), u[:, ::-1]):  # fmt: skip
        correlation = np.corrcoef(u[:, 0], other[:, 0])[0, 1]
        assert abs(correlation) < 0.03, f"streams that should be unrelated correlate by {correlation:.3f}"
    shares = np.histogram(u, bins=20, range=(0, 1))[0] / u.size
    assert abs(shares - 0.05).max() < 0.006, f"twentieths of the range hold {shares.round(4)}"


def test_generators_differ_by_each_part_of_their_key():
    firsts = [draws.generator(*key).random() for key in
              ((0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1))]  # fmt: skip
    assert len(set(firsts)) == 5, f"two keys gave the same first draw: {firsts}"
    assert draws.generator(0, "a", 0, 0).random() == firsts[0]


@given(seed=SEEDS, n=st.integers(1, 50), start=st.integers(0, 500), length=st.integers(0, 60))
def test_the_order_shows_each_picture_once_an_epoch_wherever_it_is_entered(seed, n, start, length):
    epochs, indices = draws.order(seed, n, 0, start + length)
    late_epochs, late_indices = draws.order(seed, n, start, start + length)
    np.testing.assert_array_equal(late_indices, indices[start:])
    np.testing.assert_array_equal(late_epochs, epochs[start:])
    for epoch in range((start + length) // n):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(n)), f"epoch {epoch} of {n} pictures"


def test_epochs_come_in_different_orders():
    orders = {tuple(draws.permutation(0, epoch, 20).tolist()) for epoch in range(10)}
    assert len(orders) == 10, f"10 epochs came in {len(orders)} orders"
    with pytest.raises(ValueError, match="read-only"):
        draws.permutation(0, 0, 20)[0] = 1
