"""Random tokens: what any method must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class Random:
    """A uniform ranking, the same in all layers and heads, drawn anew for every prompt and repeatable.

    Parameters
    ----------
    seed : int
        Mixed with a checksum of the first layer's keys, so that different pictures lose different tokens.
    """

    seed: int = 0

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """The same ``[1, length]`` for every layer."""
        keys = cache.layers[0].keys
        seed = zlib.crc32(keys.float().cpu().contiguous().numpy().tobytes(), self.seed)
        generator = torch.Generator().manual_seed(seed)
        ranking = torch.rand(1, cache.length, generator=generator).to(keys.device)
        return [ranking] * len(cache.layers)
