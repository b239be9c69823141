"""How lively tokens are, in whole numbers."""

from __future__ import annotations

import numpy as np

from kvferry.codecs import densities
from kvferry.codecs.activity import Activity


def laplace(rng: np.random.Generator, deviation: np.ndarray) -> np.ndarray:
    return np.rint(rng.laplace(scale=deviation / 2**0.5)).astype(np.int32)


def test_it_finds_the_size_that_tokens_really_have() -> None:
    """Tokens half, once, twice and four times as large as calibrated: an octave is 8, and the last meet the bound."""
    rng, factors = np.random.default_rng(0), np.repeat([0.5, 1.0, 2.0, 4.0], 400)
    activity = Activity(len(factors))
    row = int(densities.nearest(6.0))
    for _ in range(40):
        activity.update(row, laplace(rng, 6.0 * factors))
    found = activity.octaves().reshape(4, -1).mean(1)
    assert (np.abs(found - [-8, 0, 6, 10]) < 2).all()


def test_it_starts_at_what_was_calibrated_and_never_goes_far() -> None:
    activity = Activity(3)
    assert activity.octaves().tolist() == [0, 0, 0]
    for _ in range(200):
        activity.update(80, np.array([0, 2**31 - 1, -(2**31)], np.int32))
    assert activity.octaves().tolist() == [-24, 15, 15]


def test_coefficients_that_were_expected_to_be_zero_say_little() -> None:
    activity = Activity(1)
    for _ in range(10):
        activity.update(0, np.zeros(1, np.int32))
    assert activity.octaves().tolist() == [0]
    activity.update(80, np.zeros(1, np.int32))
    assert activity.octaves()[0] < 0
