"""Intervals: against theory, and pairing does what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from kvferry.errors import InputError
from kvferry.evaluate.stats import difference_interval, mcnemar, mean_interval, ratio_interval


def test_interval_of_a_share_agrees_with_the_normal_approximation() -> None:
    values = np.arange(1000) % 10 < 8
    estimate = mean_interval(values)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert estimate.mean == pytest.approx(0.8)
    assert estimate.n == 1000
    assert estimate.low == pytest.approx(0.8 - half, abs=0.004)
    assert estimate.high == pytest.approx(0.8 + half, abs=0.004)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_interval_holds_the_mean_and_stays_in_range(values: list[int]) -> None:
    estimate = mean_interval(values, resamples=200)
    tiny = 1e-9
    assert -tiny <= estimate.low <= estimate.mean + tiny
    assert estimate.mean - tiny <= estimate.high <= 1 + tiny


def test_pairing_makes_equal_rows_exactly_equal() -> None:
    values = np.random.default_rng(0).integers(0, 2, 300)
    same = ratio_interval(values, values)
    assert (same.low, same.mean, same.high) == (1, 1, 1)
    none = difference_interval(values, values)
    assert (none.low, none.mean, none.high) == (0, 0, 0)


def test_a_paired_difference_is_narrower_than_two_means_suggest() -> None:
    better = np.arange(400) % 2 == 0
    worse = better & (np.arange(400) >= 20)
    gap = difference_interval(better, worse)
    assert gap.low > 0
    assert gap.high - gap.low < mean_interval(better).high - mean_interval(better).low


def test_nothing_to_average_is_said() -> None:
    with pytest.raises(InputError, match="sweep"):
        mean_interval([])
    assert np.isnan(ratio_interval([0, 1], [0, 0]).mean)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_the_binomial_test_of_what_only_one_answers(pairs: list[tuple[bool, bool]]) -> None:
    one, other = zip(*pairs, strict=True)
    only = sum(a and not b for a, b in pairs)
    either = sum(a != b for a, b in pairs)
    expected = binomtest(only, either).pvalue if either else 1.0
    assert mcnemar(one, other) == pytest.approx(expected)
    assert mcnemar(one, other) == mcnemar(other, one)


def test_mcnemar_of_many_questions() -> None:
    better = np.arange(3000) < 2900
    assert mcnemar(better, ~better) == 0.0
    assert mcnemar(better, np.roll(better, 1500)) == 1.0
