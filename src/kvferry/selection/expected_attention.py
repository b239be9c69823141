"""Expected Attention: what queries like the prompt's own would look at from the positions to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch
from kvferry.selection.base import SINKS


@dataclass(frozen=True)
class ExpectedAttention:
    """Expected attention of Gaussian future queries, times the norm of the value, per layer and head.

    Based on "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution"
    (arXiv 2510.00636, section 3). For a query with mean ``m`` and covariance ``S``, both turned by the mean rotation
    of the positions to come and scaled, a key is expected to weigh ``exp(m.k + k'S k / 2)``; the weights are divided by
    their sum and averaged over the query heads of a KV group; the score is ``(weight + epsilon) * |v|``.

    What differs: the paper takes the norm of the value after the output projection, which a cache does not hold; here
    it is that of the value. As in the authors' code, the first four tokens, which stay in any case, take no part in
    the sum. Soft caps and sink logits of the few models that have them are not foreseen.

    Parameters
    ----------
    horizon : int
        How many positions after the prompt the rotation is averaged over.
    epsilon : float
        The larger, the more the value's norm alone decides; not negative.
    """

    horizon: int = 512
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        if self.horizon < 1 or not self.epsilon >= 0.0:
            raise InputError("expected_attention needs horizon >= 1 and epsilon >= 0")

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """The Gaussian model of coming queries in every layer."""
        return (EvidenceRequest("all", statistic="queries", horizon=self.horizon),)

    def score(self, cache: KVCache, evidence: Evidence) -> Sequence[torch.Tensor]:
        """``[kv_heads, length]`` per layer."""
        (request,) = self.requests
        return [self._score(layer, evidence.of(request, index)) for index, layer in enumerate(cache)]

    def _score(self, layer: LayerCache, model: torch.Tensor) -> torch.Tensor:
        keys = layer.keys.float()
        heads, n, d = keys.shape
        mean, covariance = model.to(keys.device).view(heads, -1, 1 + d, d).split_with_sizes([1, d], dim=2)
        near = keys[:, None]
        logits = (near * (mean + near @ covariance / 2)).sum(-1)
        first = SINKS if n > SINKS else 0
        expected = logits[..., first:].softmax(-1).mean(1)
        scores = (expected + self.epsilon) * layer.values[:, first:].float().norm(dim=-1)
        return torch.cat([scores.amax(-1, keepdim=True).expand(-1, first), scores], dim=-1)
