"""Value norm: large values matter. Needs no attention, so it works before any question is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class ValueNorm:
    """The L2 norm of the value, per layer and head: what a token can add to the output if it is looked at.

    Based on the value-norm ranking (VaN) of "InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video
    Understanding" (arXiv 2506.15745), which keeps the largest norms. Attention sinks have small values and would go;
    they stay because every selection keeps them. The paper joins VaN with a measure of change between video frames
    (TaR) and pools it over neighbours by layer; here it stands alone and unpooled.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        return [layer.values.float().norm(dim=-1) for layer in cache]
