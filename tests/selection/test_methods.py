"""Each selection method on small caches, its scores and its budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cache import KVCache
from kvferry.errors import EvidenceError, InputError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.recipe import Recipe
from kvferry.selection import SCORERS, SINKS, Scorer, Selection, evict, kept_count
from tests.helpers import cache as random_cache
from tests.helpers import layout


def observed(cache: KVCache, *requests: EvidenceRequest) -> Evidence:
    """Random observations for ``requests`` in every layer; two query heads per KV head."""
    generator = torch.Generator().manual_seed(1)
    heads, _, dim = cache.layers[0].keys.shape
    shapes = {"sum": (heads, cache.length), "density": (heads,), "queries": (2 * heads, 1 + dim, dim)}
    return Evidence(
        {
            request: {i: torch.rand(shapes[request.statistic], generator=generator) for i in range(len(cache.layers))}
            for request in requests
        }
    )


def choose(scorer: Scorer | str, cache: KVCache, fraction: float, evidence: Evidence | None = None) -> Selection:
    scorer = SCORERS[scorer]() if isinstance(scorer, str) else scorer
    recipe = Recipe(scorer, 1.0 if hasattr(scorer, "select") else fraction)
    return recipe.select(Prefilled(cache, evidence or observed(cache, *scorer.requests), torch.empty(0)))


@given(st.integers(1, 500), st.floats(0.001, 1.0))
def test_a_fraction_is_exact_to_a_token(length: int, fraction: float) -> None:
    count = kept_count(fraction, length)
    assert 1 <= count <= length
    assert count == 1 or abs(count - fraction * length) <= 0.5


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        kept_count(fraction, 10)


@pytest.mark.parametrize("name", [n for n in SCORERS if n not in ("none", "full")])
@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.5, 1.0])
def test_budget_is_met_in_every_layer_and_sinks_stay(name: str, fraction: float) -> None:
    cache = random_cache(layout(rows=6, columns=7))
    selection = choose(name, cache, fraction)
    expected = kept_count(fraction, cache.length)
    for positions in selection.positions:
        assert positions.shape == (2, expected)
        assert (positions.diff(dim=-1) > 0).all()
        sinks = min(SINKS, expected)
        assert torch.equal(positions[:, :sinks], torch.arange(sinks).expand(2, -1))
    small = evict(cache, selection)
    assert small.kept == (expected,) * 3
    assert small.nbytes * cache.length == cache.nbytes * expected


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "none"])
def test_keeping_everything_is_the_identity(name: str) -> None:
    cache = random_cache()
    same = evict(cache, choose(name, cache, 1.0))
    for before, after in zip(cache, same, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
        assert torch.equal(before.positions, after.positions)


def test_eviction_gathers_each_head_its_own_tokens() -> None:
    cache = random_cache()
    small = evict(cache, choose("knorm", cache, 0.3))
    for before, after in zip(cache, small, strict=True):
        for head in range(2):
            assert torch.equal(after.keys[head], before.keys[head, after.positions[head]])
            assert torch.equal(after.values[head], before.values[head, after.positions[head]])


def test_eviction_of_an_evicted_cache() -> None:
    cache = random_cache()
    half = choose("knorm", cache, 0.5)
    quarter = Selection(tuple(p[:, ::2] for p in half.positions), tuple(i[:, ::2] for i in half.importance))
    twice = evict(evict(cache, half), quarter)
    once = evict(cache, quarter)
    for a, b in zip(twice, once, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.positions, b.positions)
    with pytest.raises(InputError, match="already dropped"):
        evict(evict(cache, quarter), half)


def test_none_drops_exactly_the_visual_tokens() -> None:
    cache = random_cache()
    (positions, *_) = choose("none", cache, 1.0).positions
    kept = set(positions[0].tolist())
    assert kept == {i for i in range(cache.length) if not cache.layout.visual[i]}


def test_q2c_ranks_by_the_last_layer_or_by_all() -> None:
    cache = random_cache()
    last, every = SCORERS["q2c"](), SCORERS["q2c"](layers="all")
    sums = observed(cache, *last.requests, *every.requests)
    asked = int(cache.layout.question.nonzero()[0][-1]) + 1
    expected = sums.of(last.requests[0], 2).mean(0)
    assert torch.equal(last.score(cache, sums)[0][0][:asked], expected[:asked])
    expected = torch.stack([sums.of(every.requests[0], i).mean(0) for i in range(3)]).mean(0)
    assert torch.allclose(every.score(cache, sums)[1][0][:asked], expected[:asked])


def test_q2c_keeps_what_the_question_cannot_see() -> None:
    cache = random_cache()
    tail = list(range(int(cache.layout.question.nonzero()[0][-1]) + 1, cache.length))
    assert tail
    assert SCORERS["q2c"]().unseen(cache) == len(tail) == 2
    kept = choose("q2c", cache, (SINKS + len(tail) + 2) / cache.length).positions[0][0].tolist()
    assert kept[:SINKS] == list(range(SINKS))
    assert kept[-2:] == tail
    assert len(kept) == SINKS + len(tail) + 2


def test_snapkv_pools_neighbours_and_keeps_its_window() -> None:
    cache = random_cache(layout(rows=6, columns=10))
    snap = SCORERS["snapkv"](window=8, kernel=3)
    sums = torch.zeros(2, cache.length)
    sums[0, 20:22], sums[1, 30:32] = 1.0, 1.0
    evidence = Evidence({snap.requests[0]: dict.fromkeys(range(3), sums)})
    selection = choose(snap, cache, 16 / cache.length, evidence)
    recent = list(range(cache.length - 8, cache.length))
    assert selection.positions[0][0].tolist() == [0, 1, 2, 3, 19, 20, 21, 22, *recent]
    assert selection.positions[0][1].tolist() == [0, 1, 2, 3, 29, 30, 31, 32, *recent]


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 2}, {"kernel": 0}])
def test_snapkv_refuses_odd_settings(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="snapkv"):
        SCORERS["snapkv"](**options)


def test_random_is_repeatable_and_differs_between_prompts_and_seeds() -> None:
    one, other = random_cache(seed=1), random_cache(seed=2)
    draw = SCORERS["random"]()
    nothing = Evidence()
    assert torch.equal(draw.score(one, nothing)[0], draw.score(one, nothing)[0])
    assert not torch.equal(draw.score(one, nothing)[0], draw.score(other, nothing)[0])
    assert not torch.equal(draw.score(one, nothing)[0], SCORERS["random"](seed=1).score(one, nothing)[0])


def test_missing_evidence_says_what_to_do() -> None:
    with pytest.raises(EvidenceError, match="prefill"):
        SCORERS["q2c"]().score(random_cache(), Evidence())


@pytest.mark.parametrize("name", [n for n in SCORERS if n not in ("none", "full")])
@given(fraction=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_plain_recipes_keep_the_highest_scores(name: str, fraction: float, seed: int) -> None:
    """The rule in four lines: sinks first, then the recent tokens (which leave a quarter over), then by score."""
    cache = random_cache(layout(rows=5, columns=6), layers=2, seed=seed)
    scorer = SCORERS[name]()
    evidence = observed(cache, *scorer.requests)
    keep = kept_count(fraction, cache.length)
    tail = 2 if name == "q2c" else 0
    recent = max(tail, getattr(scorer, "recent", lambda _: 0)(keep))
    recent = max(min(recent, keep - SINKS - math.ceil(keep / 4)), 0)
    selection = choose(scorer, cache, fraction, evidence)
    for layer, score in enumerate(scorer.score(cache, evidence)):
        for head in range(2):
            ranking = score[min(head, len(score) - 1)].clone()
            ranking[cache.length - recent :] = torch.inf
            ranking[:SINKS] = torch.inf
            kept = selection.positions[layer][head]
            rest = torch.ones(cache.length, dtype=torch.bool).index_fill(0, kept, False)
            assert len(kept) == keep
            assert rest.sum() == 0 or ranking[kept].min() >= ranking[rest].max()


def test_broken_scores_and_pruned_caches_are_refused() -> None:
    cache = random_cache()
    sums = torch.full((2, cache.length), torch.nan)
    request = EvidenceRequest("question", layers="last")
    with pytest.raises(EvidenceError, match="NaN"):
        choose("q2c", cache, 0.5, Evidence({request: {2: sums}}))
    with pytest.raises(InputError, match="already pruned"):
        choose("knorm", evict(cache, choose("knorm", cache, 0.5)), 0.5)
    once = evict(cache, choose("knorm", cache, 0.5))
    again = evict(once, choose("full", once, 1.0))
    assert torch.equal(again.layers[1].keys, once.layers[1].keys)
