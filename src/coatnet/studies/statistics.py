"""Differences between two rows with the same seeds, and what they say of an ordering.

A difference is a mean over pairs of runs that share a seed; its 95 % interval is Student's t over the pairs. An
ordering holds where the whole interval lies inside what the ordering allows, does not hold where all of it lies
outside, and is open otherwise. Each interval stands for itself: with twenty orderings one may well miss by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from coatnet.studies.study import ABOUT_EQUAL, MUCH, Measure, Relation

Verdict = Literal["holds", "does not hold", "cannot tell"]
MIN_SEEDS = 3  # no answer comes from fewer
MAX_SEEDS = 1000  # more are not looked for
CONFIDENCE = 0.95
POWER = 0.8  # of the number of seeds that would tell


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with what is known of it."""

    mean: float
    low: float  # 95 % interval, Student's t over seeds; infinite for a single one
    high: float
    deviation: float  # standard deviation over seeds; NaN for a single one
    num_seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and interval of one figure a seed, or of one difference a pair. Raises: ValueError if empty."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, math.nan, n)
    deviation = float(np.std(values, ddof=1))
    half = half_width(deviation, n)
    return Estimate(mean, mean - half, mean + half, deviation, n)


def half_width(deviation: float, n: int) -> float:
    """Return half of the 95 % interval of a mean of n figures with this standard deviation."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * deviation / math.sqrt(n)


def allowed(relation: Relation, measure: Measure) -> tuple[float, float]:
    """Return which differences, first minus second where more is better, an ordering allows."""
    equal, much = ABOUT_EQUAL[measure], MUCH[measure]
    return {">>": (much, math.inf), ">": (0.0, math.inf), ">=": (-equal, math.inf), "~": (-equal, equal)}[relation]


def judge(difference: Estimate, relation: Relation, measure: Measure) -> Verdict:
    """Answer an ordering by the interval of its difference."""
    low, high = allowed(relation, measure)
    if difference.num_seeds < MIN_SEEDS:
        return "cannot tell"
    if low < difference.low and difference.high < high:
        return "holds"
    return "does not hold" if difference.high < low or high < difference.low else "cannot tell"


def seeds_that_would_tell(difference: Estimate, relation: Relation, measure: Measure) -> int | None:
    """Return with how many seeds four studies of five would have an answer, were mean and deviation those met.

    None beyond MAX_SEEDS. Few seeds know the deviation badly, so the number is rough.
    """
    edges = [edge for edge in allowed(relation, measure) if math.isfinite(edge)]
    distance = min(abs(difference.mean - edge) for edge in edges)
    if math.isnan(difference.deviation):
        return None
    counts = np.arange(MIN_SEEDS, MAX_SEEDS + 1)
    quantiles = stats.t.ppf(0.5 + CONFIDENCE / 2, counts - 1) + stats.t.ppf(POWER, counts - 1)
    tell = counts[quantiles * difference.deviation / np.sqrt(counts) < distance]  # so far from the edge is seen
    return int(tell[0]) if len(tell) else None


def spread_over_pictures(first: Sequence[NDArray[np.bool_]], second: Sequence[NDArray[np.bool_]]) -> float:
    """Return half of the 95 % interval, in points, that the choice of pictures gives a difference of accuracies.

    Both hold, for each set of pictures looked at, (S, N): which of its N are named right with each of S seeds. The
    pictures' mean differences are taken as drawn at random; sets of fewer than two add nothing.
    """
    gaps = [one.mean(axis=0) - other.mean(axis=0) for one, other in zip(first, second, strict=True)]
    variance = sum(float(gap.var(ddof=1)) / len(gap) for gap in gaps if len(gap) > 1) / len(gaps) ** 2
    return float(100 * stats.norm.ppf(0.5 + CONFIDENCE / 2) * math.sqrt(variance))
