"""Paired statistics: the same questions for every row of a table, intervals by resampling questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError

RESAMPLES = 4000
EXACT = 50
"""Up to so many differences the signed-rank test counts all signs; beyond, it takes the normal limit."""
FEWEST = 6
"""Of fewer questions no difference can be shown: even where all of them differ, McNemar's p is above 0.05."""
TOO_FEW = "too few questions"
_SEED = 20261122


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % percentile bootstrap interval over ``n`` questions."""

    mean: float
    low: float
    high: float
    n: int


def resampled_means(values: npt.NDArray[np.float64], resamples: int) -> npt.NDArray[np.float64]:
    """Means of ``resamples`` draws with replacement over the last axis; the draws are the same on every call."""
    n = values.shape[-1]
    result: npt.NDArray[np.float64] = values @ _draws(n, resamples).T / n
    return result


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each of ``n`` questions is drawn, ``[resamples, n]``."""
    drawn = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    return drawn.astype(np.float64)


def means_with_draws(
    values: npt.NDArray[np.float64], resamples: int = RESAMPLES, groups: Sequence[str] = ()
) -> npt.NDArray[np.float64]:
    """The mean over the last axis and behind it the resampled ones: ``[..., n]`` to ``[..., 1 + resamples]``.

    Where ``groups`` name what each question belongs to, groups are drawn, not questions, as in
    :func:`ratio_in_groups`.
    """
    means = values.mean(-1, keepdims=True)
    if not any(groups):
        return np.concatenate([means, resampled_means(values, resamples)], axis=-1)
    inside = _grouped(groups)
    members = np.zeros((values.shape[-1], int(inside.max()) + 1))
    members[np.arange(len(inside)), inside] = 1
    over, under = resampled_means(values @ members, resamples), resampled_means(members.sum(0), resamples)
    return np.concatenate([means, over / under], axis=-1)


def _grouped(groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each group, ``[n]``; an empty name is a group of its own.

    Where all questions are of one group, nothing can be drawn but questions: each is its own.
    """
    keys = [group or f"\0{i}" for i, group in enumerate(groups)]
    if len(set(keys)) == 1:
        keys = [f"\0{i}" for i in range(len(keys))]
    inside: npt.NDArray[np.int64] = np.unique(np.asarray(keys), return_inverse=True)[1]
    return inside


def estimate_of(found: npt.NDArray[np.float64], n: int) -> Estimate:
    """What a statistic came to (first) and its interval (from the draws behind), ``[1 + resamples]``."""
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return Estimate(float(found[0]), float(low), float(high), n)


def mean_interval(values: npt.ArrayLike, resamples: int = RESAMPLES) -> Estimate:
    """Mean of per-question values ``[n]`` and its interval."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise InputError("no questions to average over; run the sweep first")
    means = resampled_means(array, resamples)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high), array.size)


def ratio_interval(values: npt.ArrayLike, reference: npt.ArrayLike, resamples: int = RESAMPLES) -> Estimate:
    """Mean of ``values`` as a fraction of the mean of ``reference``, both ``[n]`` over the same questions (paired)."""
    pair = np.stack([np.asarray(values, np.float64), np.asarray(reference, np.float64)])
    if pair.shape[-1] == 0:
        raise InputError("no questions to average over; run the sweep first")
    if pair[1].mean() == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), pair.shape[-1])
    means = resampled_means(pair, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[0] / means[1]
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return Estimate(float(pair[0].mean() / pair[1].mean()), float(low), float(high), pair.shape[-1])


def difference_interval(values: npt.ArrayLike, reference: npt.ArrayLike, resamples: int = RESAMPLES) -> Estimate:
    """Mean paired difference ``values - reference`` and its interval."""
    return mean_interval(np.asarray(values, np.float64) - np.asarray(reference, np.float64), resamples)


def ratio_in_groups(over: npt.ArrayLike, under: npt.ArrayLike, groups: Sequence[str]) -> Estimate:
    """Ratio of two sums over questions ``[n]``; the interval draws groups of questions, not questions.

    Questions on one picture are not independent of each other. An empty name is a group of its own.
    """
    inside = _grouped(groups)
    above, below = (np.bincount(inside, weights=np.asarray(x, np.float64)) for x in (over, under))
    return replace(ratio_interval(above, below), n=len(groups))


def mcnemar(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Exact two-sided p of McNemar's test: right and wrong answers ``[n]`` of two rows to the same questions.

    Under the null hypothesis each question that only one of the two answers rightly is a toss of a fair coin
    (Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947).
    """
    one, other = np.asarray(values, bool), np.asarray(reference, bool)
    only = (int((one & ~other).sum()), int((other & ~one).sum()))
    tail = sum(math.comb(sum(only), k) for k in range(min(only) + 1))
    return min(1.0, tail / (1 << sum(only)) * 2)


def paired_p(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Two-sided p of two rows' scores ``[n]`` on the same questions.

    McNemar's test where all are 0 or 1, else the signed-rank test.
    """
    one, other = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    judged = np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()
    return mcnemar(one, other) if judged else wilcoxon(one, other)


def wilcoxon(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Two-sided p of the signed-rank test: measures ``[n]`` of two rows on the same questions, such as KL.

    Differences of 0 are left out, equal ones share their mean rank (F. Wilcoxon, "Individual comparisons by ranking
    methods", 1945). Up to :data:`EXACT` differences exact; beyond, the normal limit with the variance corrected for
    equal differences.
    """
    difference = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    difference = difference[difference != 0]
    n = difference.size
    if n == 0:
        return 1.0
    _, place, count = np.unique(np.abs(difference), return_inverse=True, return_counts=True)
    twice = 2 * np.cumsum(count) - count + 1
    above = int(twice[place][difference > 0].sum())
    if n <= EXACT:
        return _exact_rank_sum(twice[place].tolist(), above)
    variance = (n * (n + 1) * (2 * n + 1) - (count.astype(np.float64) ** 3 - count).sum() / 2) / 24
    return math.erfc(abs(above / 2 - n * (n + 1) / 4) / math.sqrt(2 * variance))


def _exact_rank_sum(ranks: list[int], found: int) -> float:
    """Two-sided p of ``found`` as the sum of those of ``ranks`` that a fair coin picks."""
    total = sum(ranks)
    ways = [1] + [0] * total
    for rank in ranks:
        ways = [a + (ways[at - rank] if at >= rank else 0) for at, a in enumerate(ways)]
    return min(1.0, sum(ways[: min(found, total - found) + 1]) / (1 << len(ranks)) * 2)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for how many there are, so that any of them misleads as seldom as one alone would.

    S. Holm, "A simple sequentially rejective multiple test procedure", 1979: the smallest of ``m`` is taken ``m``
    times, the next ``m - 1`` times, and none may fall below one before it.
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted
