"""The nouns of selection: a scorer ranks tokens, a selection names those that stay, :func:`evict` gathers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvferry.cache import KVCache
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
        heads = [[x.flatten().cpu().numpy() for x in self.heads(i)] for i in range(len(self.positions))]
        return summarise(heads, cache.layout, cache.length, self.scored)
