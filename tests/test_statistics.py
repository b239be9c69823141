"""Intervals: against theory, and pairing does what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import wilcoxon as scipy_wilcoxon

from kvferry.errors import InputError
from kvferry.statistics import difference_interval, holm, mcnemar, mean_interval, ratio_interval, wilcoxon


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


@pytest.mark.parametrize("n", [1, 5, 20, 50])
def test_signed_ranks_of_few_questions_are_exact(n: int) -> None:
    draw = np.random.default_rng(n)
    one, other = draw.normal(0.3, 1, n), draw.normal(size=n)
    assert wilcoxon(one, other) == pytest.approx(scipy_wilcoxon(one, other, method="exact").pvalue)
    assert wilcoxon(one, other) == wilcoxon(other, one)


@pytest.mark.parametrize("digits", [1, 6])
def test_signed_ranks_of_many_questions_with_ties_and_zeros(digits: int) -> None:
    draw = np.random.default_rng(digits)
    one, other = draw.normal(0.05, 1, 900).round(digits), draw.normal(size=900).round(digits)
    expected = scipy_wilcoxon(one, other, method="asymptotic", correction=False, zero_method="wilcox").pvalue
    assert wilcoxon(one, other) == pytest.approx(expected)


def test_signed_ranks_with_ties_by_hand() -> None:
    # Differences 1, 1, 2 with ranks 1.5, 1.5, 3, all above 0: one of eight ways on either side.
    assert wilcoxon([1, 2, 3], [0, 1, 1]) == pytest.approx(2 / 8)
    # -1, 1, 2: sums of at most 1.5 come from no rank, or either of the tied ones.
    assert wilcoxon([0, 2, 3], [1, 1, 1]) == pytest.approx(2 * 3 / 8)
    assert wilcoxon([1, 2], [1, 2]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_and_keeps_the_order(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= a <= min(1.0, len(ps) * p) for p, a in zip(ps, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(ps, kind="stable")] == sorted(adjusted)
