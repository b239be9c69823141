"""Drop every visual token: the floor of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch
from kvferry.selection.base import Selection


@dataclass(frozen=True)
class NoVisual:
    """All text tokens and no visual one.

    What a model still answers from this cache it owes to guessing, to the question, and in protocol A to what
    prefill already moved from the picture into the question's own keys and values.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """One for text, zero for visual tokens: ``[1, length]`` per layer."""
        text = torch.from_numpy(~cache.layout.visual[: cache.length]).float()[None]
        return [text.to(layer.keys.device) for layer in cache]

    def select(self, cache: KVCache, evidence: Evidence) -> Selection:
        """Positions of the text tokens."""
        positions, importance = [], []
        for layer, text in zip(cache, self.score(cache, evidence), strict=True):
            heads = layer.heads
            kept = text[0].nonzero().T.expand(heads, -1).contiguous()
            positions.append(kept)
            importance.append(torch.ones_like(kept, dtype=torch.float32))
        return Selection(tuple(positions), tuple(importance))
