"""SnapKV: what the end of the prompt looks at, per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class SnapKV:
    """Attention of the last ``window`` prompt tokens, summed and pooled along the prompt; the window itself stays.

    Based on SnapKV (arXiv 2404.14469). The paper never goes below the size of the window; where the budget does, the
    part of the window that stays takes at most half of it, so that something of the rest is left.

    Parameters
    ----------
    window : int
        Observing queries at the end of the prompt.
    kernel : int
        Odd width of the pooling along tokens; 1 switches it off.
    pool : {"avg", "max"}
        How neighbours are pooled. Pooling runs over the prompt order, across picture rows as the paper has it.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError("snapkv needs window >= 1 and an odd kernel >= 1")

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Column sums of the window's rows in every layer."""
        return (EvidenceRequest("window", window=self.window),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        (request,) = self.requests
        return [self._pool(evidence.of(request, layer)) for layer in range(len(cache.layers))]

    def recent(self, keep: int) -> int:
        """The window, but at most half of what a layer keeps."""
        return min(self.window, keep // 2)

    def _pool(self, sums: torch.Tensor) -> torch.Tensor:
        """Pool ``[kv_heads, length]`` along tokens with an output of the same shape."""
        if self.kernel == 1:
            return sums
        pad = self.kernel // 2
        if self.pool == "max":
            return torch.nn.functional.max_pool1d(sums[None], self.kernel, stride=1, padding=pad)[0]
        pool = torch.nn.functional.avg_pool1d
        return pool(sums[None], self.kernel, stride=1, padding=pad, count_include_pad=False)[0]
