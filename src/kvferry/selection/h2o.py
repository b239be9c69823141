"""H2O: what the whole prompt has looked at so far, and the most recent tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class H2O:
    """Attention that all prompt tokens pay to a token, summed, per layer and head; half the budget is recent tokens.

    Based on "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv 2306.14048,
    section 4). The paper evicts token by token, so that a sum only counts the queries a token lived to see; here one
    eviction follows the whole prompt. Query heads of a KV group share a ranking, which the paper's models did not need.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Column sums of all rows in every layer."""
        return (EvidenceRequest("all"),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        (request,) = self.requests
        return [evidence.of(request, layer) for layer in range(len(cache.layers))]

    def recent(self, keep: int) -> int:
        """Half of what a layer keeps."""
        return keep // 2
