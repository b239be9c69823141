"""Bytes needed for a share of full accuracy, on curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvferry.errors import InputError
from study.bytes_needed import bytes_needed

N = 1000
FULL = np.arange(N) < 900


def right(share: float) -> np.ndarray:
    return np.arange(N) < share * N


def test_a_measured_point_that_just_reaches_is_the_answer() -> None:
    found = bytes_needed([100, 400], [right(0.45), right(0.882)], 1600, FULL, 0.98)
    assert found.mean == pytest.approx(400)
    assert found.low <= found.mean <= found.high
    assert found.n == N


def test_between_two_points_accuracy_is_linear_in_the_logarithm() -> None:
    found = bytes_needed([400, 100], [right(0.9), right(0.5)], 1600, FULL, 7 / 9)
    assert found.mean == pytest.approx(200)


def test_a_poor_method_needs_almost_the_full_cache() -> None:
    found = bytes_needed([400], [right(0.1)], 1600, FULL, 0.98)
    assert 1500 < found.mean < 1600


def test_a_method_that_is_always_good_enough_needs_its_smallest_point() -> None:
    found = bytes_needed([400, 100], [right(0.9), right(0.9)], 1600, FULL, 0.95)
    assert found.mean == found.low == found.high == pytest.approx(100)


def test_a_dip_behind_the_first_success_does_not_matter() -> None:
    found = bytes_needed([100, 400], [right(0.9), right(0.2)], 1600, FULL, 0.98)
    assert found.mean == pytest.approx(100)


def test_the_interval_is_wider_with_fewer_questions() -> None:
    rng = np.random.default_rng(0)

    def width(n: int) -> float:
        curve = [rng.random(n) < p for p in (0.5, 0.8, 0.88)]
        found = bytes_needed([100, 200, 400], curve, 800, rng.random(n) < 0.9, 0.95)
        return math.log(found.high / found.low)

    assert width(200) > width(5000)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="one row of answers"):
        bytes_needed([1, 2], [right(0.5)], 3, FULL, 0.98)
