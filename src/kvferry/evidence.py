"""What prefill observed of attention: nothing more than the recipe's scorers asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from kvferry.cache import KVCache
from kvferry.errors import EvidenceError

Rows = Literal["question", "window", "post_vision", "all"]


@dataclass(frozen=True)
class EvidenceRequest:
    """Column sums of softmax attention over some query rows.

    Parameters
    ----------
    rows : {"question", "window", "post_vision", "all"}
        Which queries are summed over: the question's tokens, the last ``window`` prompt tokens, everything after
        the last visual token, or all.
    window : int
        Only for ``rows="window"``.
    layers : {"all", "last"}
        Where to observe.
    """

    rows: Rows
    window: int = 0
    layers: Literal["all", "last"] = "all"
    statistic: Literal["sum", "density"] = "sum"
    threshold: float = 0.01


@dataclass(frozen=True)
class Evidence:
    """Column sums by request: per observed layer a float32 tensor ``[kv_heads, length]``.

    ``A[q, j]`` is averaged over the query heads of a KV group and summed over the requested rows.
    Rows run over the whole prompt; columns over the tokens the cache holds.
    """

    column_sums: dict[EvidenceRequest, dict[int, torch.Tensor]] = field(default_factory=dict)

    def of(self, request: EvidenceRequest, layer: int) -> torch.Tensor:
        """Column sums of ``layer`` (float32 ``[kv_heads, length]``) or a clear error."""
        try:
            return self.column_sums[request][layer]
        except KeyError:
            raise EvidenceError(
                f"attention of the {request.rows!r} rows was not observed in layer {layer}; "
                "pass the recipe to prefill(..., recipe=...) so that it knows what to look at"
            ) from None


@dataclass(frozen=True)
class Prefilled:
    """What ``VLM.prefill`` returns: the full cache, what was observed, and what it cost.

    ``next_logits`` (float32 ``[vocabulary]``) belongs to the first answer token; for a scene without a question it
    belongs to whatever would follow the scene.
    """

    cache: KVCache
    evidence: Evidence
    next_logits: torch.Tensor
    seconds: float = 0.0
