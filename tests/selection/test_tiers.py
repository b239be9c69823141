"""Kept tokens in tiers."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.recipe import Recipe
from kvferry.selection import SINKS, Order, in_tiers
from kvferry.selection.tiers import Tier
from tests.helpers import cache, layout

RECIPES = ["knorm@0.4", "full", "none", "knorm@0.4,budget=head", "random@0.05", "value_norm@0.3,budget=pyramid:4"]


def dealt(recipe: str, tiers: int, order: Order = "importance") -> tuple[KVCache, list[Tier]]:
    kept, importance = Recipe.parse(recipe).rank(cache())
    return kept, list(in_tiers(kept, importance, tiers, order))


@given(st.sampled_from(RECIPES), st.integers(1, 9), st.sampled_from(["importance", "layer", "token"]))
def test_nothing_is_lost_or_sent_twice(recipe: str, tiers: int, order: Order) -> None:
    kept, parts = dealt(recipe, tiers, order)
    for index, layer in enumerate(kept):
        own = [part for part in parts if part.layer == index]
        assert len(own) <= tiers
        assert [part.more for part in own] == [True] * (len(own) - 1) + [False]
        for head, whole in enumerate(layer.split()):
            pieces = [part.tokens.split()[head] for part in own]
            positions = torch.cat([piece.positions[0] for piece in pieces])
            assert positions.sort().values.tolist() == whole.positions[0].tolist()
            assert all((piece.positions.diff() > 0).all() for piece in pieces)
            keys = torch.cat([piece.keys[0] for piece in pieces])
            assert torch.equal(keys[positions.argsort()], whole.keys[0])


def test_tiers_are_equally_large_and_the_first_comes_first() -> None:
    _, parts = dealt("knorm@0.4", 4)
    assert [part.layer for part in parts] == [0, 1, 2] * 4
    assert [part.tokens.kept for part in parts] == [3] * 12
    _, parts = dealt("knorm@0.4", 4, "layer")
    assert [part.layer for part in parts] == [0] * 4 + [1] * 4 + [2] * 4


def test_sinks_then_text_then_falling_scores() -> None:
    kept, importance = Recipe.parse("knorm@0.6").rank(cache())
    assert importance is not None
    visual = kept.layout.visual
    for index, (layer, scores) in enumerate(zip(kept, importance, strict=True)):
        where = dict(zip(layer.positions[0].tolist(), scores[0].tolist(), strict=True))
        ones = [x for x in in_tiers(kept, importance, layer.kept, "importance") if x.layer == index]
        order = [int(x.tokens.positions[0, 0]) for x in ones]
        assert set(order[:SINKS]) == set(range(SINKS))
        later = order[SINKS:]
        assert sorted(visual[later]) == visual[later].tolist()
        for part in ([p for p in later if not visual[p]], [p for p in later if visual[p]]):
            assert all(where[a] >= where[b] for a, b in pairwise(part))


def test_what_a_policy_protects_goes_before_other_text() -> None:
    kept, importance = Recipe.parse("knorm@0.8,modality=visual_heavy").rank(cache())
    assert importance is not None
    ones = [x.tokens for x in in_tiers(kept, importance, kept.layers[0].kept, "importance") if x.layer == 0]
    order = [int(one.positions[0, 0]) for one in ones]
    scores = dict(zip(kept.layers[0].positions[0].tolist(), importance[0][0].tolist(), strict=True))
    protected = [np.isposinf(scores[p]) for p in order]
    assert any(protected[SINKS:])
    assert sorted(protected, reverse=True) == protected


def test_tokens_that_are_all_alike_are_spread_over_the_picture() -> None:
    prompt = layout(text_before=4, rows=8, columns=8, question=2, tail=2)
    _, importance = Recipe.parse("full").rank(cache(prompt))
    assert importance is None
    first = [x for x in in_tiers(cache(prompt), None, 4) if x.layer == 0][1].tokens.positions[0]
    visual = first[torch.from_numpy(prompt.visual)[first]]
    assert len(visual) >= 16
    assert int(visual.diff().max()) <= 8


def test_in_the_order_of_the_prompt() -> None:
    kept, parts = dealt("knorm@0.4", 3, "token")
    own = [part.tokens.positions[0] for part in parts if part.layer == 1]
    assert torch.equal(torch.cat(own), kept.layers[1].positions[0])


def test_layers_of_few_tokens_and_of_none() -> None:
    full = cache(layers=2)
    empty = LayerCache(*(x[:, :0] for x in (full.layers[0].keys, full.layers[0].values, full.layers[0].positions)))
    two = full.layers[1].take(torch.tensor([[0, 5], [0, 5]]))
    kept = KVCache((empty, two), full.layout, full.length, full.fingerprint)
    parts = list(in_tiers(kept, None, 5))
    assert [(part.layer, part.tokens.kept, part.more) for part in parts] == [
        (0, 0, False), (1, 1, True), (1, 1, False),
    ]  # fmt: skip


def test_an_order_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="importance, layer, token"):
        list(in_tiers(cache(), None, 2, "size"))  # type: ignore[arg-type]
