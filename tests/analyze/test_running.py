"""Streams in fixed memory give what the whole would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.analyze.running import Reservoir, Running, mean_over


@given(st.lists(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(np.nan)), min_size=3, max_size=3), max_size=20))
def test_running_is_batch(rows: list[list[float]]) -> None:
    running = Running()
    for row in rows:
        running.add(row)
    whole = np.array(rows or [[np.nan] * 3])
    for column, mean, spread in zip(
        whole.T, np.broadcast_to(running.mean, 3), np.broadcast_to(running.spread, 3), strict=True
    ):
        known = column[~np.isnan(column)]
        np.testing.assert_allclose(mean, known.mean() if len(known) else np.nan, atol=1e-9)
        np.testing.assert_allclose(spread, known.std(ddof=1) if len(known) > 1 else np.nan, atol=1e-7)


def test_the_margin_is_that_of_a_mean() -> None:
    running = Running()
    for value in range(100):
        running.add([value])
    assert running.margin[0] == pytest.approx(1.96 * np.arange(100).std(ddof=1) / 10)


def test_a_reservoir_keeps_everything_that_fits_and_no_more_than_that() -> None:
    small, large = Reservoir(5), Reservoir(50)
    for i in range(40):
        small.add([i, i])
        large.add([i, i])
    assert small.rows.shape == (5, 2)
    assert large.rows[:, 0].tolist() == list(range(40))
    assert Reservoir().rows.shape == (0,)


def test_a_reservoir_is_a_uniform_draw() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(5, seed)
        for i in range(20):
            reservoir.add(i)
        counts[reservoir.rows] += 1
    assert counts.min() > 500 - 5 * 20
    assert counts.max() < 500 + 5 * 20


def test_mean_over_what_was_measured() -> None:
    values = [[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]]
    np.testing.assert_array_equal(mean_over(values, 0), [2.0, 5.0, np.nan])
