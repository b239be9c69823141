"""K-norm: small keys matter. Needs no attention, so it works before any question is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class KNorm:
    """Minus the L2 norm of the key, per layer and head.

    Based on Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv 2406.11430), as known from kvpress. Rotation does not change a norm, so post-rotary keys will do.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        return [-layer.keys.float().norm(dim=-1) for layer in cache]
