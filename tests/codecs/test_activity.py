"""How lively tokens are, in whole numbers."""

from __future__ import annotations

import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kvferry.codecs import densities
from kvferry.codecs.activity import Activity


def laplace(rng: np.random.Generator, deviation: np.ndarray) -> np.ndarray:
    return np.rint(rng.laplace(scale=deviation / 2**0.5)).astype(np.int32)


def test_it_finds_the_size_that_tokens_really_have() -> None:
    """Tokens half, once, twice and four times as large as calibrated: an octave is 8, and the last meet the bound."""
    rng, factors = np.random.default_rng(0), np.repeat([0.5, 1.0, 2.0, 4.0], 400)
    activity = Activity(len(factors))
    deviations = np.linspace(9, 3, 40)
    symbols = np.stack([laplace(rng, x * factors) for x in deviations])
    activity.update(densities.nearest(deviations[:10])[:, None], symbols[:10])
    activity.update(densities.nearest(deviations[10:])[:, None], symbols[10:])
    found = activity.octaves().reshape(4, -1).mean(1)
    assert (np.abs(found - [-8, 0, 6, 10]) < 2).all()


def test_it_starts_at_what_was_calibrated_and_never_goes_far() -> None:
    activity = Activity(3)
    assert activity.octaves().tolist() == [0, 0, 0]
    line = np.array([0, 2**31 - 1, -(2**31)], np.int32)
    activity.update(np.full((200, 1), 80, np.uint8), np.tile(line, (200, 1)))
    assert activity.octaves().tolist() == [-24, 16, 16]


def test_coefficients_that_were_expected_to_be_zero_say_little() -> None:
    activity = Activity(1)
    activity.update(np.zeros((10, 1), np.uint8), np.zeros((10, 1), np.int32))
    assert activity.octaves().tolist() == [0]
    activity.update(np.array([[80]], np.uint8), np.zeros((1, 1), np.int32))
    assert activity.octaves()[0] < 0


@given(st.integers(0, 9), st.lists(st.lists(st.integers(-60, 90), max_size=5), max_size=5), st.data())
def test_compiled_loops_give_the_same_numbers(tokens: int, batches: list[list[int]], data: st.DataObject) -> None:
    kernels = pytest.importorskip("kvferry.codecs.activity_kernels")
    plain, compiled = Activity(tokens), kernels.Activity(tokens)
    magnitudes = st.sampled_from([0, 1, -1, 5, 300, 2**18 + 1, 2**31 - 1, -(2**31)])
    for batch in batches:
        octaves = np.array(batch, np.int64)[:, None]
        if data.draw(st.booleans()):
            octaves = octaves + data.draw(npst.arrays(np.int64, tokens, elements=st.integers(-20, 20)))
        for mine, theirs in zip(plain.groups(octaves), compiled.groups(octaves), strict=True):
            assert np.array_equal(mine, theirs)
        symbols = data.draw(npst.arrays(np.int32, (len(batch), tokens), elements=magnitudes))
        for each in (plain, compiled):
            each.update(densities.model_of(octaves), symbols)
        assert np.array_equal(plain.octaves(), compiled.octaves())


def test_groups_are_stable_and_hold_every_symbol_once() -> None:
    activity = Activity(3)
    activity.update(np.array([[60]], np.uint8), np.array([[0, 8, 90]], np.int32))
    order, counts, which = activity.groups(np.array([[16], [8]]))
    models = densities.model_of(np.array([[16], [8]]) + activity.octaves()).reshape(-1)
    assert models[order].tolist() == np.repeat(which, counts).tolist() == sorted(models.tolist())
    assert all((np.diff(order[models[order] == model]) > 0).all() for model in which)
