"""Paired statistics: the same questions for every row of a table, intervals by resampling questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError

RESAMPLES = 4000
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


def means_with_draws(values: npt.NDArray[np.float64], resamples: int = RESAMPLES) -> npt.NDArray[np.float64]:
    """The mean over the last axis and behind it the resampled ones: ``[..., n]`` to ``[..., 1 + resamples]``."""
    return np.concatenate([values.mean(-1, keepdims=True), resampled_means(values, resamples)], axis=-1)


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
    keys = [group or f"\0{i}" for i, group in enumerate(groups)]
    inside = np.unique(np.asarray(keys), return_inverse=True)[1]
    above, below = (np.bincount(inside, weights=np.asarray(x, np.float64)) for x in (over, under))
    return replace(ratio_interval(above, below), n=len(keys))


def mcnemar(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Exact two-sided p of McNemar's test: right and wrong answers ``[n]`` of two rows to the same questions.

    Under the null hypothesis each question that only one of the two answers rightly is a toss of a fair coin
    (Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947).
    """
    one, other = np.asarray(values, bool), np.asarray(reference, bool)
    only = (int((one & ~other).sum()), int((other & ~one).sum()))
    tail = sum(comb(sum(only), k) for k in range(min(only) + 1))
    return min(1.0, tail / (1 << sum(only)) * 2)
