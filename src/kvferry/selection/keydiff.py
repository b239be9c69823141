"""KeyDiff: keys unlike the others matter. Needs no attention, so it works before any question is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class KeyDiff:
    """Minus the cosine between a token's key and the mean of all keys, each of length one, per layer and head.

    Based on "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments" (arXiv 2504.15364, section 3.2). Keys are post-rotary, as the paper's cache holds them; the paper
    evicts block by block during prefill, here once after it.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        directions = [torch.nn.functional.normalize(layer.keys.float(), dim=-1) for layer in cache]
        return [-torch.nn.functional.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1) for x in directions]
