# SPDX-License-Identifier: MIT
"""Ratios of times with intervals that hold on a machine that is not quiet.

Samples come in rounds: each candidate once per round, in random order. A ratio is the median over the rounds of the
ratio within a round, so what disturbs a whole round cancels. Its interval is the hull of two:

* the percentile interval of a circular block bootstrap (Politis and Romano 1992): rounds are resampled in blocks of
  consecutive ones, because disturbances last longer than a round, and resampling single rounds would take them for
  independent and come out too narrow;
* the order statistics that a sign test leaves (Lehmann, Nonparametrics, sec. 2.4). Between two candidates that are the
  same, which of them is the slower in a round is decided by the random order alone, whatever the noise and however long
  it lasts, so this one is exact there, also for few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Of every interval. High, because a report has dozens of rows, and each is one more chance to be wrong.
LEVEL = 0.99

RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


class Ratio(NamedTuple):
    """``low`` and ``high`` bound ``value`` at :data:`LEVEL`."""

    value: float
    low: float
    high: float

    @property
    def contains_one(self) -> bool:
        return self.low <= 1.0 <= self.high


def fewest_rounds(level: float = LEVEL) -> int:
    """The least number of rounds that can support an interval: all of them on one side is then rare enough."""
    return math.ceil(1 - math.log2(1 - level))


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median, over the rounds, of ``numerator`` over ``denominator``."""
    above, below = _paired(numerator, denominator)
    return float(np.median(above / below))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], level: float = LEVEL) -> Ratio | None:
    """:func:`ratio` with its interval; None with fewer than :func:`fewest_rounds`. The same input, the same answer."""
    above, below = _paired(numerator, denominator)
    if above.size < fewest_rounds(level):
        return None
    low, high = median_interval(above / below, level)
    return Ratio(float(np.median(above / below)), low, high)


def median_interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Of the median of values in the order in which they were measured."""
    tail = (1 - level) / 2
    low, high = np.quantile(bootstrap_medians(values), [tail, 1 - tail])
    ranked, k = np.sort(values), sign_test_rank(len(values), level)
    return min(float(low), float(ranked[k])), max(float(high), float(ranked[-1 - k]))


def bootstrap_medians(values: Floats, seed: int = 0) -> Floats:
    """Medians of :data:`RESAMPLES` samples drawn in blocks of about the cube root of their number, around a circle."""
    count = len(values)
    length = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(count, size=(RESAMPLES, math.ceil(count / length)))
    indices = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    medians: Floats = np.median(values[indices], axis=1)
    return medians


def sign_test_rank(count: int, level: float = LEVEL) -> int:
    """The largest k such that fewer than k + 1 of ``count`` fair coins show heads with a chance below the tail."""
    tail, below, k = (1 - level) / 2, 0.5**count, 0
    while k + 1 <= count // 2 and (below := below + math.comb(count, k + 1) * 0.5**count) <= tail:
        k += 1
    return k


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Of the mean of values that are independent of each other: Student's. At least four of them."""
    sample = np.asarray(values, dtype=np.float64)
    half = student_quantile((1 + level) / 2, sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return float(sample.mean()) - half, float(sample.mean()) + half


def student_quantile(p: float, freedom: int) -> float:
    """Student's t by its expansion around the normal quantile, right to 1 % from three degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom < 3:
        raise RuntimeError(
            f"student_quantile: freedom must be at least 3, got {freedom}; the expansion is not good there"
        )
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**i for i, term in enumerate(terms)))


def _paired(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[Floats, Floats]:
    above, below = (np.asarray(values, dtype=np.float64) for values in (numerator, denominator))
    if above.shape != below.shape or above.size == 0:
        raise RuntimeError(
            f"ratio: both must have one sample per round, got {above.size} and {below.size}; "
            "they must come from the same call of measure"
        )
    return above, below
