"""The allocation is an optimum: held against all choices there are."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kvferry.errors import BudgetError
from kvferry.fit.allocate import allocate


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    cells, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows = lambda values: st.lists(st.lists(values, min_size=choices, max_size=choices), min_size=cells, max_size=cells)  # noqa: E731
    costs = np.array(draw(rows(st.integers(0, 9))), np.int64)
    damage = np.array(draw(rows(st.integers(0, 1000) | st.sampled_from([0, 0, 7]))), float)
    return costs, damage, draw(st.integers(0, 45))


@given(problems())
def test_nothing_within_the_budget_does_less_harm(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    costs, damage, budget = problem
    cells = np.arange(len(costs))
    ways = [np.array(way) for way in product(range(costs.shape[1]), repeat=len(costs))]
    fitting = [way for way in ways if costs[cells, way].sum() <= budget]
    if not fitting:
        with pytest.raises(BudgetError, match="budget"):
            allocate(costs, damage, budget)
        return
    chosen = allocate(costs, damage, budget)
    assert costs[cells, chosen].sum() <= budget
    assert damage[cells, chosen].sum() == min(damage[cells, way].sum() for way in fitting)


def test_of_equal_harm_the_cheapest() -> None:
    costs, damage = np.array([[3, 1, 2], [5, 4, 6]]), np.array([[0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    assert allocate(costs, damage, 100).tolist() == [1, 0]


def test_a_model_of_many_layers() -> None:
    rng = np.random.default_rng(0)
    widths = np.array([1, 2, 3, 4, 8, 16])
    tokens = np.tile([1369, 40], 56)[:, None]
    costs = tokens * (8 * widths + 2)
    damage = rng.exponential(size=(112, 1)) * np.exp(-widths / rng.uniform(0.5, 2, (112, 1)))
    budget = int(costs[:, 3].sum())
    chosen = allocate(costs, damage, budget)
    cells = np.arange(112)
    assert costs[cells, chosen].sum() <= budget
    assert damage[cells, chosen].sum() < 0.9 * damage[:, 3].sum()
