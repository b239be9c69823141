"""Q2C: what the question looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class Q2C:
    """Attention that the question's tokens pay to every prompt token, one ranking for all layers.

    Based on W.-L. Cheng and W. Liao, "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM
    Inference" (2026), equation of the Q2C score: sum over query heads and question tokens in the last layer.
    We average over heads instead of summing, which leaves the ranking as it is. Tokens behind the question (the
    template's tail) cannot be seen by it, so they have no score: they stay, as recent tokens do. The paper's prompts
    end in the question.

    Parameters
    ----------
    layers : {"last", "all"}
        Observe the last layer, or average the scores of all of them (the paper's ablation).
    """

    layers: Literal["last", "all"] = "last"

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Column sums of the question's rows."""
        return (EvidenceRequest("question", layers=self.layers),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """The same ``[1, length]`` for every layer."""
        (request,) = self.requests
        count = len(cache.layers)
        observed = range(count) if self.layers == "all" else [count - 1]
        device = cache.layers[0].keys.device
        sums = [evidence.of(request, layer).to(device).mean(0, keepdim=True) for layer in observed]
        return [torch.stack(sums).mean(0)] * count

    def unseen(self, cache: KVCache) -> int:
        """Tokens behind the question; none where there is no question."""
        asked = cache.layout.question.nonzero()[0]
        return max(0, cache.length - int(asked[-1]) - 1) if len(asked) else 0
