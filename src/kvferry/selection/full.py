"""Keep everything: the ceiling of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest


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
