"""StreamingLLM: the first tokens and the most recent ones, whatever they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class Streaming:
    """Later is better; the first four tokens stay in any case, as they do for every scorer.

    Based on "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453, section 3.2). The paper
    renumbers positions within the cache; here kept keys stay where they stood in the prompt, as for every scorer.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Nothing is observed."""
        return ()

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """The position, ``[1, length]`` per layer."""
        return [torch.arange(cache.length, dtype=torch.float32, device=x.keys.device)[None] for x in cache]
