"""Selections as masks: one scorer at several fractions in one go, the same tokens as :meth:`kvferry.Recipe.select`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvferry.evidence import Prefilled
from kvferry.recipe import Recipe
from kvferry.selection import SINKS, kept_count
from kvferry.selection.budgets import Uniform
from kvferry.selection.choose import recent_count
from kvferry.selection.eviction import rising


def masks(prefilled: Prefilled, recipes: Sequence[str]) -> torch.Tensor:
    """Which tokens each recipe keeps, bool ``[recipes, layers, kv_heads, length]``.

    Recipes differ in scorer and fraction only. Scores are computed once for a scorer, and all layers are ranked at
    once.
    """
    cache = prefilled.cache
    scores: dict[str, torch.Tensor] = {}
    kept = []
    for text in recipes:
        recipe = Recipe.parse(text)
        name = str(recipe.selection)
        if name not in scores:
            heads = cache.layers[0].heads
            each = recipe.selection.score(cache, prefilled.evidence)
            scores[name] = torch.stack([x.float().expand(heads, -1) for x in each])
        if not isinstance(recipe.budget, Uniform) or recipe.merge is not None:
            raise NotImplementedError(f"{text} is more than a scorer and a fraction")
        kept.append(_kept(scores[name], recipe, prefilled))
    return torch.stack(kept)


def _kept(scores: torch.Tensor, recipe: Recipe, prefilled: Prefilled) -> torch.Tensor:
    length = prefilled.cache.length
    keep = kept_count(recipe.fraction, length)
    recent = recent_count(recipe.selection, prefilled.cache, keep)
    largest = torch.finfo(torch.float32).max
    ranked = scores.clamp(-largest, largest)
    ranked[..., length - recent :] = rising(recent, ranked)
    ranked[..., : min(SINKS, keep)] = torch.inf
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(keep, dim=-1).indices, True)
