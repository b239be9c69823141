"""VL-Cache: what the text after the picture looks at, per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch

RECENT = 0.1


@dataclass(frozen=True)
class VLCache:
    """Accumulated post-vision attention: that of all tokens after the last visual one, summed.

    Based on "VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model Inference
    Acceleration" (arXiv 2410.23317, section 4.2). All prompt tokens compete, text and visual alike, and a tenth of the
    budget is the most recent tokens. The paper's other half, budgets by each layer's sparsity, is a budget of its own.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Column sums of the rows after the last visual token in every layer."""
        return (EvidenceRequest("post_vision"),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        (request,) = self.requests
        return [evidence.of(request, layer) for layer in range(len(cache.layers))]

    def recent(self, keep: int) -> int:
        """A tenth of what a layer keeps."""
        return round(RECENT * keep)
