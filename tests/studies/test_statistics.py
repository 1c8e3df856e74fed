"""Intervals against SciPy's own test of pairs; verdicts at their edges; the number of seeds that would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coatnet.studies.statistics import (
    Estimate,
    allowed,
    estimate,
    half_width,
    judge,
    seeds_that_would_tell,
    spread_over_pictures,
)

FIGURES = st.lists(st.floats(0, 100), min_size=3, max_size=20)


@given(FIGURES, st.integers(0, 1000))
def test_the_interval_is_scipys_paired_t(first: list[float], seed: int):
    second = np.random.default_rng(seed).uniform(0, 100, len(first)).tolist()
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    found, wanted = estimate(gaps), stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert found.mean == pytest.approx(np.mean(gaps), abs=1e-9)


def test_one_seed_knows_no_interval():
    found = estimate([3.0])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert judge(found, ">", "top1_percent") == "cannot tell"
    assert seeds_that_would_tell(found, ">", "top1_percent") is None


def difference(low: float, high: float, n: int = 3) -> Estimate:
    deviation = (high - low) / 2 / half_width(1.0, n)
    return Estimate((low + high) / 2, low, high, deviation, n)


@pytest.mark.parametrize(
    ("relation", "low", "high", "verdict"),
    [
        (">", 0.1, 0.9, "holds"),
        (">", -0.1, 0.9, "cannot tell"),
        (">", -0.9, -0.1, "does not hold"),
        (">=", -0.4, 0.9, "holds"),
        (">=", -0.6, 0.9, "cannot tell"),
        (">=", -0.9, -0.6, "does not hold"),
        ("~", -0.4, 0.4, "holds"),
        ("~", -0.6, 0.4, "cannot tell"),
        ("~", 0.6, 0.9, "does not hold"),
        ("~", -0.9, -0.6, "does not hold"),
        (">>", 2.1, 5.0, "holds"),
        (">>", 1.9, 5.0, "cannot tell"),
        (">>", 0.1, 1.9, "does not hold"),
    ],
)
def test_verdicts(relation: str, low: float, high: float, verdict: str):
    assert judge(difference(low, high), relation, "top1_percent") == verdict  # pyright: ignore[reportArgumentType]


def test_two_seeds_answer_nothing():
    assert judge(difference(0.1, 0.9, n=2), ">", "top1_percent") == "cannot tell"


@given(st.floats(-3, 3), st.floats(0.01, 3), st.sampled_from([">", ">=", "~", ">>"]))
def test_so_many_seeds_would_tell(mean: float, deviation: float, relation: str):
    def met(n: int) -> Estimate:
        half = half_width(deviation, n)
        return Estimate(mean, mean - half, mean + half, deviation, n)

    needed = seeds_that_would_tell(met(3), relation, "top1_percent")  # pyright: ignore[reportArgumentType]
    if needed is None:
        return
    assert judge(met(needed), relation, "top1_percent") != "cannot tell"  # pyright: ignore[reportArgumentType]


def test_so_many_seeds_tell_in_four_studies_of_five():
    """Draw studies of that many seeds from the difference met, and count those with the right answer."""
    first = difference(-0.6, 1.0)
    needed = seeds_that_would_tell(first, ">", "top1_percent")
    assert needed is not None
    drawn = np.random.default_rng(0).normal(first.mean, first.deviation, (2000, needed))
    right = np.mean([judge(estimate(gaps), ">", "top1_percent") == "holds" for gaps in drawn.tolist()])
    assert 0.77 < right < 0.85, f"{needed} seeds answer in {right:.0%} of studies"


def test_losses_have_margins_of_their_own():
    assert allowed("~", "train_loss") != allowed("~", "top1_percent")


@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 100))
def test_the_spread_over_pictures_is_the_normal_interval_of_the_mean_gap(n: int, num_seeds: int, seed: int):
    first, second = np.random.default_rng(seed).random((2, num_seeds, n)) < 0.7
    gaps = first.mean(axis=0) - second.mean(axis=0)
    wanted = 196 * stats.sem(gaps)
    assert spread_over_pictures([first], [second]) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_pictures_that_differ_by_seed_may_differ_in_number():
    first, second = (np.random.default_rng(seed).random((1, 100 + seed)) < 0.7 for seed in (0, 1))
    alone = spread_over_pictures([first[:, :100]], [second[:, :100]])
    both = spread_over_pictures([first[:, :100], second], [second[:, :100], first[:, [*range(100), 0]]])
    assert both == pytest.approx(alone / np.sqrt(2), rel=0.05), "twice as many pictures"
