"""Leave-one-out: how far a head's output would move without the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch


@dataclass(frozen=True)
class LeaveOut:
    """The change of a head's output, for the queries at the end of the prompt, when one token is left out.

    kvferry's own. The last prompt token is fed again when a cache is resumed, so what it attends to is what the answer
    will need. Without token ``j`` softmax gives its share ``a_j`` to the others, and the output ``o`` moves by exactly
    ``a_j / (1 - a_j) * (v_j - o)``: a token with much attention but a value like everyone's is not missed. The score
    is the length of that move; being in units of the output, it can be compared between heads (``budget=head``).

    ``a`` is the mean over the window's rows and the query heads of a KV group, so for more than one of them the formula
    is an approximation.

    Parameters
    ----------
    window : int
        Queries at the end of the prompt.
    """

    window: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError("leaveout needs window >= 1")

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """Column sums of the window's rows in every layer."""
        return (EvidenceRequest("window", window=self.window),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        (request,) = self.requests
        scores = []
        for index, layer in enumerate(cache):
            sums = evidence.of(request, index).to(layer.values.device)
            share = sums / sums.sum(-1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)
            values = layer.values.float()
            output = share.unsqueeze(1) @ values
            scores.append(share / (1 - share).clamp_min(1e-6) * (values - output).norm(dim=-1))
        return scores
