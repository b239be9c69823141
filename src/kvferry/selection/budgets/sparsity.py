"""VL-Cache's layer budget: dense attention gets more tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.selection.budgets.base import Budget
from kvferry.selection.budgets.shares import share_out

FLOOR = 0.01


@dataclass(frozen=True)
class Sparsity(Budget):
    """Layers share the budget in proportion to the density of their post-vision attention.

    Based on VL-Cache (arXiv 2410.23317): ``beta_l = clip((1 - gamma_l) / sum(1 - gamma) * alpha * L, 0.01, 1)``, where
    ``1 - gamma_l`` is the share of the causal entries ``A[q, j]`` of the rows after the last visual token that reach
    ``0.01 * max_j A[q, j]``, averaged over heads. The paper does not renormalise after the clip; we do, so that the
    total is exactly what was asked for.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """The post-vision rows' density in every layer."""
        return (EvidenceRequest("post_vision", statistic="density", threshold=0.01),)

    def counts(self, cache: KVCache, evidence: Evidence, fraction: float, least: int) -> list[int]:
        """In proportion to the density, at least 1 % of the prompt."""
        (request,) = self.requests
        weights = [float(evidence.of(request, layer).mean()) for layer in range(len(cache.layers))]
        floor = min(math.floor(FLOOR * cache.length), math.floor(fraction * cache.length))
        return share_out(weights, fraction, cache.length, max(least, floor, 1))
