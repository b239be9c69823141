"""Selections as masks: one scorer at several fractions in one go, the same tokens as :meth:`kvferry.Recipe.select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest, Prefilled
from kvferry.recipe import Recipe
from kvferry.selection import Scorer, choose


@dataclass(frozen=True)
class _Known:
    """A scorer whose scores of this cache are known; all else is the scorer's own."""

    scorer: Scorer
    scores: Sequence[torch.Tensor]

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        return self.scorer.requests

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        return self.scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)


def masks(prefilled: Prefilled, recipes: Sequence[str]) -> torch.Tensor:
    """Which tokens each recipe keeps, bool ``[recipes, layers, kv_heads, length]``.

    Scores are computed once for a scorer.

    Raises
    ------
    InputError
        A recipe merges what it drops, which no mask can say.
    """
    cache, evidence = prefilled.cache, prefilled.evidence
    known: dict[Scorer, Sequence[torch.Tensor]] = {}
    shape, device = (len(cache.layers), cache.layers[0].heads, cache.length), cache.layers[0].keys.device
    kept = torch.zeros(len(recipes), *shape, dtype=torch.bool, device=device)
    for row, text in enumerate(recipes):
        recipe = Recipe.parse(text)
        if recipe.merge is not None:
            raise InputError(f"{text} merges tokens, which a mask over one cache cannot; leave the merge out")
        if recipe.selection not in known:
            known[recipe.selection] = recipe.selection.score(cache, evidence)
        scorer = _Known(recipe.selection, known[recipe.selection])
        chosen = choose(cache, evidence, scorer, recipe.budget, recipe.modality, recipe.fraction)
        for layer in range(len(cache.layers)):
            for head, positions in enumerate(chosen.heads(layer)):
                kept[row, layer, head, positions[0]] = True
    return kept
