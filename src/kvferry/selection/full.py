"""Keep everything: the ceiling of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch
from kvferry.selection.base import Selection


@dataclass(frozen=True)
class Full:
    """All tokens, all alike."""

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """Zeros ``[1, length]`` per layer."""
        return [torch.zeros(1, cache.length, device=layer.keys.device) for layer in cache]

    def select(self, cache: KVCache, evidence: Evidence) -> Selection:
        """What the cache holds, which may have been pruned before."""
        return Selection(
            tuple(layer.positions for layer in cache),
            tuple(torch.zeros_like(layer.positions, dtype=torch.float32) for layer in cache),
            tuple(layer.counts for layer in cache),
        )
