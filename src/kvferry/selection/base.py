"""The nouns of selection: a scorer ranks tokens, a selection names those that stay, :func:`evict` gathers them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch
from kvferry.summary import Summary, summarise

SINKS = 4
"""The first tokens soak up attention whatever they say (StreamingLLM, arXiv 2309.17453); they always stay."""


@runtime_checkable
class Scorer(Protocol):
    """Importance of every token the cache holds.

    ``score`` returns one float32 tensor per layer, ``[kv_heads, length]`` or ``[1, length]`` where all heads agree;
    higher stays. A scorer may also have ``recent(keep: int) -> int``: how many of the most recent tokens stay whatever
    their score where a layer keeps ``keep``; and ``unseen(cache) -> int``: how many tokens at the end its scores say
    nothing of, so that they stay as well. Both yield where little is kept (:data:`kvferry.selection.choose.SCORED`).
    One without any choice (``full``, ``none``) has ``select(cache, evidence) -> Selection`` instead of a fraction.
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
    counts : tuple of tuple of int
        Per layer, empty where all its heads keep equally many. Else how many each head keeps; its positions and
        importance are then ``[1, sum]``, the heads end to end. Empty where no layer needs it.
    scored : tuple of float
        Per layer, how many of the tokens that a head keeps the scorer chose: not the sinks, the recent tokens or a
        modality that stays whole. The mean over heads; empty where no scorer had a choice to make.
    """

    positions: tuple[torch.Tensor, ...]
    importance: tuple[torch.Tensor, ...]
    counts: tuple[tuple[int, ...], ...] = ()
    scored: tuple[float, ...] = ()

    def heads(self, layer: int) -> list[torch.Tensor]:
        """Positions that every head of ``layer`` keeps, ``[1, kept]`` each."""
        counts = self.counts[layer] if self.counts else ()
        sizes, axis = (list(counts), 1) if counts else (1, 0)
        return list(torch.split(self.positions[layer], sizes, axis))

    def summary(self, cache: KVCache) -> Summary:
        """What is kept where of ``cache``, from which this was selected."""
        heads = [self.heads(i) for i in range(len(self.positions))]
        return summarise(heads, cache.layout, cache.length, self.scored)


def kept_count(fraction: float, length: int) -> int:
    """Tokens that ``fraction`` of ``length`` stands for: nearest whole token, at least one."""
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"a fraction of kept tokens must lie in (0, 1], not {fraction:g}")
    return max(1, min(length, math.floor(fraction * length + 0.5)))


def rising(count: int, like: torch.Tensor) -> torch.Tensor:
    """``count`` numbers above any score, for the end of a prompt: where not all of it has room, the last stay."""
    return torch.linspace(0.5, 1.0, count, device=like.device, dtype=like.dtype) * torch.finfo(like.dtype).max


def evict(cache: KVCache, selection: Selection) -> KVCache:
    """Gather the selected tokens; what is dropped is freed. Kept keys keep their original rotation."""
    if len(selection.positions) != len(cache.layers):
        raise InputError(f"a selection of {len(selection.positions)} layers does not fit {len(cache.layers)}")
    layers = []
    for index, layer in enumerate(cache):
        wanted = selection.heads(index)
        if not layer.counts and len({x.shape[1] for x in wanted}) == 1:
            layers.append(_gather(layer, torch.cat(wanted), cache.length))
        else:
            heads = zip(layer.split(), wanted, strict=True)
            layers.append(LayerCache.join([_gather(head, row, cache.length) for head, row in heads]))
    return replace(cache, layers=tuple(layers), scored=selection.scored)


def _gather(layer: LayerCache, wanted: torch.Tensor, length: int) -> LayerCache:
    """The entries of ``layer`` (equally long heads) at the prompt positions ``wanted`` (``[kv_heads, k]``)."""
    wanted = wanted.to(layer.positions.device)
    if layer.kept == length:
        return layer.take(wanted)
    index = torch.searchsorted(layer.positions, wanted.contiguous()).clamp(max=max(layer.kept - 1, 0))
    if wanted.shape[1] > layer.kept or not torch.equal(layer.positions.gather(1, index), wanted):
        raise InputError("the selection names tokens that this cache has already dropped")
    return layer.take(index)
