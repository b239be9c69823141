"""How many tokens where: exact totals, floors, and what each budget is for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cache import KVCache
from kvferry.errors import BudgetError, InputError, RecipeError
from kvferry.evidence import Evidence, Prefilled
from kvferry.recipe import Recipe
from kvferry.selection import SINKS, Selection, evict, kept_count
from kvferry.selection.budgets import Head, Pyramid, Sparsity, Uniform
from kvferry.selection.budgets.shares import share_out
from tests.helpers import cache as random_cache
from tests.helpers import layout


def select(recipe: str, cache: KVCache, density: list[float] | None = None) -> Selection:
    """What ``recipe`` keeps, on random attention and the given densities per layer."""
    parsed = Recipe.parse(recipe)
    generator = torch.Generator().manual_seed(1)
    observed = {}
    for request in parsed.requests:
        if request.statistic == "density":
            layers = {i: torch.full((2,), x) for i, x in enumerate(density or [0.5] * len(cache.layers))}
        else:
            layers = {i: torch.rand(2, cache.length, generator=generator) for i in range(len(cache.layers))}
        observed[request] = layers
    return parsed.select(Prefilled(cache, Evidence(observed), torch.empty(0)))


def totals(selection: Selection) -> list[int]:
    """Entries per layer."""
    return [sum(x.shape[1] for x in selection.heads(i)) for i in range(len(selection.positions))]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.integers(1, 500),
    st.integers(1, 20),
)
def test_whole_tokens_are_shared_out_exactly(weights: list[float], fraction: float, length: int, least: int) -> None:
    total = max(len(weights), math.floor(fraction * length * len(weights) + 0.5))
    if least > length or total < least * len(weights):
        with pytest.raises(BudgetError, match="smallest fraction"):
            share_out(weights, fraction, length, least)
        return
    counts = share_out(weights, fraction, length, least)
    assert sum(counts) == total
    assert least <= min(counts)
    assert max(counts) <= length
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(counts[a] <= counts[b] + 1 for a, b in pairwise(order))


@pytest.mark.parametrize("budget", ["uniform", "pyramid", "pyramid:2", "sparsity", "head", "head:0", "head:1"])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.33, 0.9, 1.0])
def test_every_budget_keeps_exactly_its_total(budget: str, fraction: float) -> None:
    cache = random_cache(layout(rows=6, columns=7), layers=5)
    selection = select(f"knorm@{fraction},budget={budget}", cache, density=[0.01, 0.9, 0.2, 0.3, 0.6])
    per_layer = budget == "uniform" or budget.startswith("head")
    whole = math.floor(fraction * cache.length * 5 + 0.5)
    expected = 5 * kept_count(fraction, cache.length) if per_layer else whole
    assert sum(totals(selection)) == 2 * max(5, expected)
    small = evict(cache, selection)
    assert small.nbytes * cache.length * 10 == cache.nbytes * sum(totals(selection))
    for layer in small:
        for head, kept in zip(layer.split(), layer.per_head, strict=True):
            sinks = min(SINKS, layer.kept)
            assert kept >= 1
            assert head.positions[0, :sinks].tolist() == list(range(sinks))


def test_a_pyramid_falls_linearly() -> None:
    cache = random_cache(layout(rows=20, columns=20), layers=5)
    counts = Pyramid().counts(cache, Evidence(), 0.1, 1)
    mean = 0.1 * cache.length
    assert counts[0] == pytest.approx(mean * (2 - 1 / 20), abs=1)
    assert counts[-1] == pytest.approx(mean / 20, abs=1)
    steps = [a - b for a, b in pairwise(counts)]
    assert max(steps) - min(steps) <= 2
    flat = Pyramid(1).counts(cache, Evidence(), 0.1, 1)
    assert max(flat) - min(flat) <= 1
    assert max(Pyramid().counts(cache, Evidence(), 0.9, 1)) == cache.length


def test_sparsity_follows_density() -> None:
    cache = random_cache(layout(rows=10, columns=10), layers=3)
    counts = [x // 2 for x in totals(select("knorm@0.2,budget=sparsity", cache, [0.1, 0.2, 0.3]))]
    for count, share in zip(counts, (1 / 6, 2 / 6, 3 / 6), strict=True):
        assert count == pytest.approx(share * 0.2 * cache.length * 3, abs=1)
    flooded = [x // 2 for x in totals(select("knorm@0.6,budget=sparsity", cache, [1e-6, 0.5, 0.5]))]
    assert flooded[0] == 1 == math.floor(0.01 * cache.length)
    full = [x // 2 for x in totals(select("knorm@0.8,budget=sparsity", cache, [0.01, 0.5, 0.5]))]
    assert full[1:] == [cache.length] * 2


def test_heads_compete_but_none_is_emptied() -> None:
    cache = random_cache(layout(rows=6, columns=10), layers=1)
    cache.layers[0].keys[0] *= 0.01  # small keys matter to knorm: head 0 wins everything
    keep = kept_count(0.3, cache.length)
    for share in (0.0, 0.2, 0.5, 1.0):
        owed = max(SINKS, math.ceil(share * keep))
        ours = [x.shape[1] for x in select(f"knorm@0.3,budget=head:{share}", cache).heads(0)]
        assert ours == [2 * keep - owed, owed]
    first, _ = select("knorm@0.9,budget=head:0", cache).heads(0)
    assert first.shape[1] == cache.length


def test_one_ranking_for_all_heads_cannot_be_shared_out() -> None:
    with pytest.raises(InputError, match="ranks all heads alike"):
        select("q2c@0.5,budget=head", random_cache())
    alone = random_cache(heads=1)
    assert select("random@0.5,budget=head", alone).positions[0].equal(select("random@0.5", alone).positions[0])


@pytest.mark.parametrize("wrong", ["pyramid:0.5", "pyramid:nan", "pyramid:inf", "head:-0.1", "head:1.5", "head:nan"])
def test_arguments_out_of_range(wrong: str) -> None:
    with pytest.raises(RecipeError, match=f"budget={wrong.split(':')[0]}"):
        Recipe.parse(f"knorm@0.5,budget={wrong}")


def test_only_sparsity_looks_at_attention() -> None:
    assert [bool(x.requests) for x in (Uniform(), Pyramid(), Head(), Sparsity())] == [False, False, False, True]
    (request,) = Sparsity().requests
    assert (request.rows, request.statistic, request.threshold) == ("post_vision", "density", 0.01)
