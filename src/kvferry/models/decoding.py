"""A cache that stays under a bound while the answer grows: what was said is ranked too, and evicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, RecipeError, UnsupportedModelError
from kvferry.evidence import Evidence
from kvferry.models.attention import Observer
from kvferry.models.blockwise import Rule, column_sums
from kvferry.models.cache_layers import KeptLayer
from kvferry.selection.base import SINKS, Scorer
from kvferry.selection.budgets import Uniform
from kvferry.selection.choose import choose
from kvferry.selection.modality import POLICIES


@dataclass(frozen=True)
class Decoding:
    """After every pass no head holds more than ``tokens``, however many are said.

    A head that would hold more is cut to ``tokens - every``: the first tokens of the prompt stay, then what the scorer
    wants, by the attention of the newest ``every`` queries to all that the head holds. So each selection makes room
    for ``every`` tokens. Prompt and answer compete alike, and kept keys keep the rotation of their position, as in a
    compressed prompt. Of the queries that went before nothing is remembered; H2O (arXiv 2306.14048) and kvpress'
    ``DecodingPress`` bound caches in this way, by all queries and by those since the last selection.

    Parameters
    ----------
    tokens : int
        The bound.
    every : int
        New tokens between two selections, and queries that are looked at; both are memory beside the cache.
    scorer : str
        With its options but without a fraction, as ``snapkv,kernel=1`` or ``knorm``.

    Raises
    ------
    InputError
        Numbers that leave a selection no choice.
    RecipeError
        A scorer that is none, that has no choice, or that looks at what an answer has not: a question, pictures.
    """

    tokens: int
    every: int = 32
    scorer: str = "snapkv,kernel=1"

    def __post_init__(self) -> None:
        if self.every < 1 or self.tokens - self.every <= SINKS:
            raise InputError(
                f"a bound of {self.tokens} tokens with a selection every {self.every} leaves nothing to choose beside "
                f"the first {SINKS}; every is at least 1, and tokens at least every + {SINKS + 1}"
            )
        _ = self._scorer

    @cached_property
    def _scorer(self) -> Scorer:
        from kvferry.recipe import Recipe

        name, *options = self.scorer.split(",")
        if "@" in self.scorer or "|" in self.scorer:
            raise RecipeError(f"{self.scorer!r} must be a scorer and its options only, as snapkv,window=8 or knorm")
        recipe = Recipe.parse(",".join([f"{name.strip()}@0.5", *options]))
        if str(replace(recipe, selection=Recipe.parse("knorm@0.5").selection)) != "knorm@0.5|bf16":
            raise RecipeError(f"{self.scorer}: budget, modality and merge are for prompts; leave them out of decoding=")
        for request in recipe.requests:
            if request.statistic != "sum" or request.rows in ("question", "visual"):
                what = "coming queries" if request.statistic != "sum" else f"the {request.rows}"
                raise RecipeError(
                    f"{name} looks at {what}, which an answer that grows has not; choose snapkv, h2o, vlcache, knorm, "
                    "keydiff, value_norm, streaming or random for decoding="
                )
        return recipe.selection

    def cut(self, layer: KeptLayer) -> bool:
        """Hold ``layer`` under the bound; returns whether anything had to go."""
        if layer.longest <= self.tokens:
            return False
        queries, rule = layer.newest, layer.rule
        assert queries is not None
        assert rule is not None
        each = zip(layer.sequences(), queries, strict=True)
        layer.put([self._sequence(held, mine, rule, layer) for held, mine in each])
        return True

    def _sequence(self, held: LayerCache, queries: torch.Tensor, rule: Rule, layer: KeptLayer) -> LayerCache:
        """What one sequence keeps; ``queries`` are ``[query_heads, q, d]``."""
        if not held.counts:
            return self._heads(held, queries, rule, layer)
        groups = queries.view(held.heads, -1, *queries.shape[1:])
        sinks = [None] * held.heads if rule.sinks is None else list(rule.sinks.view(held.heads, -1))
        return LayerCache.join(
            [
                self._heads(head, some, replace(rule, sinks=sink), layer)
                for head, some, sink in zip(held.split(), groups, sinks, strict=True)
            ]
        )

    def _heads(self, held: LayerCache, queries: torch.Tensor, rule: Rule, layer: KeptLayer) -> LayerCache:
        """What heads that hold equally many keep."""
        stored, count = held.keys.shape[1], queries.shape[1]
        if stored <= self.tokens:
            return held
        mine = torch.arange(layer.length - count, layer.length, device=held.positions.device)[:, None]
        seen = held.positions[:, None] <= mine
        if layer.window is not None:
            seen &= held.positions[:, None] > mine - layer.window
        seen = seen.repeat_interleave(len(queries) // len(seen), 0)
        rows, weights = torch.arange(count), torch.ones(1, count)
        (sums,) = column_sums(queries, held.keys, rows, weights, replace(rule, mask=seen))
        evidence = Evidence({request: {0: sums} for request in self._scorer.requests})
        cache = KVCache((held,), _words(stored), stored, fingerprint="")
        keep = (self.tokens - self.every) / stored
        chosen = choose(cache, evidence, self._scorer, Uniform(), POLICIES["uniform"](), keep)
        return held.take(chosen.positions[0].to(held.positions.device))


def check_decoding(decoding: Any, tied: bool) -> None:
    """Refuse what cannot be bounded.

    Raises
    ------
    InputError
        No :class:`Decoding`.
    UnsupportedModelError
        The model mixes the heads of a layer.
    """
    if not isinstance(decoding, Decoding):
        raise InputError(f"decoding is a kvferry.Decoding(tokens=..., every=...), not {decoding!r}")
    if tied:
        raise UnsupportedModelError(
            "this model mixes the heads of a layer, which must all keep the same tokens, and decoding= ranks heads "
            "apart; leave it out"
        )


class TailObserver(Observer):
    """Remembers the newest ``most`` queries of a prompt as well, so that its cache can be bounded too.

    Attributes
    ----------
    tails : dict of int to (tensor, Rule)
        Per layer these queries, ``[query_heads, q, d]``, and how they attend.
    """

    def __init__(self, most: int, *args: Any) -> None:
        super().__init__(*args)
        self._most = most
        self.tails: dict[int, tuple[torch.Tensor, Rule]] = {}

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, rule: Rule, first: int = 0) -> None:
        super().observe(layer, query, key, rule, first)
        before = [self.tails[layer][0]] if first else []
        tail = torch.cat([*before, query], dim=1)[:, -self._most :].clone()
        self.tails[layer] = (tail, replace(rule, mask=None, causal=False))


def hand_over(observers: Sequence[Observer], layers: Sequence[KeptLayer]) -> None:
    """Give the layers of a batch the newest queries of its prompts, as many as the shortest has."""
    for index, layer in enumerate(layers):
        tails = [x.tails[index] for x in observers if isinstance(x, TailObserver)]
        count = min(query.shape[1] for query, _ in tails)
        layer.note(torch.stack([query[:, -count:] for query, _ in tails]), tails[0][1], count)


def _words(count: int) -> PromptLayout:
    """A prompt of ``count`` words, for scorers that ask."""
    zeros = np.zeros(count, np.uint8)
    return PromptLayout(zeros.astype(np.int32), zeros, zeros, np.arange(count, dtype=np.int32)[None])
