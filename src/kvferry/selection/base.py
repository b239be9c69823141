"""Scorers rank tokens; a budget says how many stay; the kept ones are gathered. No transformers here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest

SINKS = 4
"""The first tokens soak up attention whatever they say (StreamingLLM, arXiv 2309.17453); they always stay."""


@runtime_checkable
class Scorer(Protocol):
    """Importance of every token the cache holds.

    ``score`` returns one float32 tensor per layer, ``[kv_heads, length]`` or ``[1, length]`` where all heads agree;
    higher stays. ``inf`` keeps a token whatever the budget. A scorer whose rule is more than "the highest stay" may
    also have ``select(cache, evidence, fraction) -> Selection``, which then decides.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill must observe for this scorer."""
        ...

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """Importance per layer."""
        ...


@dataclass(frozen=True)
class Selection:
    """The kept positions.

    Parameters
    ----------
    positions : tuple of int64 ``[kv_heads, kept]``
        Per layer, ascending.
    importance : tuple of float32 ``[kv_heads, kept]``
        The scores of what was kept, so that a bitstream can put the most important tokens first.
    """

    positions: tuple[torch.Tensor, ...]
    importance: tuple[torch.Tensor, ...]

    def heads(self, layer: int) -> list[torch.Tensor]:
        """Positions that every head of ``layer`` keeps, ``[1, kept]`` each."""
        return list(self.positions[layer].unsqueeze(1))


def kept_count(fraction: float, length: int) -> int:
    """Tokens that ``fraction`` of ``length`` stands for: nearest whole token, at least one."""
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"a fraction of kept tokens must lie in (0, 1], not {fraction:g}")
    return max(1, min(length, math.floor(fraction * length + 0.5)))


def top_tokens(scores: Sequence[torch.Tensor], fraction: float, heads: int, recent: int = 0) -> Selection:
    """Keep the highest-scoring ``fraction`` of tokens in every layer and head (uniform budget).

    The first :data:`SINKS` tokens and the ``recent`` last ones stay whatever their score; the recent ones take at
    most half the budget.
    """
    positions, importance = [], []
    for score in scores:
        keep = kept_count(fraction, score.shape[-1])
        ranked = score.clone()
        sinks = min(SINKS, keep)
        ranked[:, :sinks] = math.inf
        ranked[:, score.shape[-1] - min(recent, keep // 2, keep - sinks) :] = math.inf
        index = ranked.topk(keep, dim=-1).indices.sort(dim=-1).values
        positions.append(index.expand(heads, -1).contiguous())
        importance.append(ranked.gather(-1, index).expand(heads, -1).contiguous())
    return Selection(tuple(positions), tuple(importance))


def evict(cache: KVCache, selection: Selection) -> KVCache:
    """Gather the selected tokens; what is dropped is freed. Kept keys keep their original rotation."""
    if len(selection.positions) != len(cache.layers):
        raise InputError(f"a selection of {len(selection.positions)} layers does not fit {len(cache.layers)}")
    layers = []
    for layer, wanted in zip(cache.layers, selection.positions, strict=True):
        if layer.kept == cache.length:
            index = wanted.to(layer.positions.device)
        else:
            index = torch.searchsorted(layer.positions, wanted.to(layer.positions.device).contiguous())
            index = index.clamp(max=layer.kept - 1)
            if not torch.equal(layer.positions.gather(1, index), wanted.to(layer.positions.device)):
                raise InputError("the selection names tokens that this cache has already dropped")
        layers.append(layer.take(index))
    return replace(cache, layers=tuple(layers))
