"""Forecasts: the arithmetic, what is not known, and whether the stated error is the real one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import InputError
from kvferry.link import Ewma, Forecast, HarmonicMean, Quantile, forecast
from kvferry.link.channels import walk
from kvferry.link.estimate import LEAST, below
from kvferry.link.trace import transfer_end

MAKERS = [
    Ewma,
    HarmonicMean,
    lambda lanes=1: Quantile(Ewma(lanes=lanes)),
    lambda lanes=1: Quantile(HarmonicMean(lanes=lanes)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_known_before_the_first_backlogged_transfer(make) -> None:
    estimator = make()
    assert forecast(estimator) is None
    estimator.observe(336, 0.02, backlogged=False)
    estimator.observe(336, 0.0)
    assert forecast(estimator) is None
    estimator.observe(125_000, 0.1)
    known = forecast(estimator)
    assert known is not None
    assert known.bits_per_second == pytest.approx(10e6)
    assert known.ratios == (() if isinstance(estimator, Quantile) else None)


@pytest.mark.parametrize("make", MAKERS)
def test_an_outage_is_news_but_no_division_by_zero(make) -> None:
    estimator = make()
    for nbytes in (1_000_000, 0, 0, 1_000_000, 1_000_000):
        estimator.observe(nbytes, 1.0)
        known = forecast(estimator)
        assert known is not None
        assert np.isfinite(known.bits_per_second)
        assert np.isfinite(known.ratios or ()).all()
    assert known.bits_per_second < 8e6


@pytest.mark.parametrize("make", MAKERS)
def test_lanes_are_followed_apart(make) -> None:
    together, alone = make(lanes=3), [make() for _ in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(12):
        nbytes, seconds, backlogged = rng.integers(1, 10**6, 3), rng.random(3) + 0.1, rng.random(3) < 0.7
        together.observe(nbytes, seconds, backlogged)
        for lane, estimator in enumerate(alone):
            estimator.observe(nbytes[lane], seconds[lane], backlogged[lane])
    assert [forecast(together, lane) for lane in range(3)] == [forecast(estimator) for estimator in alone]


def test_ewma() -> None:
    estimator = Ewma(alpha=0.3)
    for mbit in (10, 20, 5):
        estimator.observe(mbit * 125_000, 1.0)
    assert estimator.predict()[0] == pytest.approx(0.3 * 5e6 + 0.7 * (0.3 * 20e6 + 0.7 * 10e6))


def test_harmonic_mean_with_robust_mpc_s_discount() -> None:
    estimator = HarmonicMean(last=2)
    for mbit in (4, 8):
        estimator.observe(mbit * 125_000, 1.0)
    mean, error = 2 / (1 / 4 + 1 / 8), abs(4 - 8) / 8
    assert estimator.predict()[0] == pytest.approx(1e6 * mean / (1 + error))
    for _ in range(3):
        estimator.observe(8 * 125_000, 1.0)
    assert estimator.predict()[0] == pytest.approx(8e6)


@given(st.floats(-1e9, 1e9) | st.just(float("nan")), st.floats(-10, 10) | st.just(float("inf")))
def test_only_real_transfers_are_taken(nbytes: float, seconds: float) -> None:
    estimator = Ewma()
    if nbytes >= 0 and 0 <= seconds < float("inf"):
        estimator.observe(nbytes, seconds)
        assert seconds == 0 or estimator.predict()[0] >= LEAST
    else:
        with pytest.raises(InputError, match="transfer"):
            estimator.observe(nbytes, seconds)


def test_bad_settings() -> None:
    for make in (lambda: Ewma(alpha=0), lambda: HarmonicMean(last=0), lambda: Quantile(Ewma(), window=0)):
        with pytest.raises(InputError):
            make()


def test_the_chance_of_a_small_ratio() -> None:
    ratios = np.array([[0.5, 0.8, 1.0, 1.2], [0.5, np.nan, np.nan, np.nan], [np.nan] * 4])
    chances = below(ratios, np.array([[0.4, 0.9], [0.4, 0.9], [0.4, 0.9]]))
    assert chances.tolist() == [[1 / 5, 3 / 5], [1 / 2, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("base", [Ewma, HarmonicMean])
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.25])
def test_coverage_on_a_changing_link(base, epsilon: float) -> None:
    """Transfers fall below the stated bound about as often as stated: never much more often, and not never."""
    lanes, steps, rng = 200, 300, np.random.default_rng(4)
    trace = walk(1.0, 16.0).trace(4_000, seed=9)
    estimator = Quantile(base(lanes=lanes))
    starts = rng.random(lanes) * trace.period
    missed, counted = 0, 0
    for step in range(steps):
        nbytes = np.full(lanes, 500_000.0)
        seconds = transfer_end(trace, starts, nbytes) - starts
        if step > 64:
            stated = below(estimator.ratios(), (8 * nbytes / seconds / estimator.predict())[:, None])[:, 0]
            missed += int((stated <= epsilon).sum())
            counted += lanes
        estimator.observe(nbytes, seconds)
        starts = starts + seconds + 2.0
    assert 0.6 * epsilon <= missed / counted <= 1.25 * epsilon


def test_forecasts_compare_by_value() -> None:
    assert Forecast(1.0, (0.5,)) == Forecast(1.0, (0.5,))
