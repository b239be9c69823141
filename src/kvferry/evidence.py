"""What prefill observed of attention: nothing more than the recipe's scorers asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvferry.cache import KVCache
from kvferry.errors import EvidenceError, InputError
from kvferry.lazy import torch

Rows = Literal["question", "window", "post_vision", "visual", "all"]
Statistic = Literal["sum", "density", "queries"]


@dataclass(frozen=True)
class EvidenceRequest:
    """What to note down about softmax attention ``A[q, j]`` of some query rows.

    Parameters
    ----------
    rows : {"question", "window", "post_vision", "visual", "all"}
        Which queries: the question's tokens, the last ``window`` prompt tokens, everything after the last visual
        token, the visual tokens, or all.
    window : int
        Only for ``rows="window"``.
    layers : {"all", "last"}
        Where to observe.
    statistic : {"sum", "density", "queries"}
        ``sum``: columns of ``A`` summed over the rows, float32 ``[kv_heads, length]``.
        ``density``: share of the entries the rows may see with ``A[q, j] >= threshold * max_j A[q, j]``, float32
        ``[kv_heads]``; one minus the sparsity ``gamma`` of VL-Cache (arXiv 2410.23317).
        ``queries``: a Gaussian model of the queries to come (Expected Attention, arXiv 2510.00636), float32
        ``[query_heads, 1 + head_dim, head_dim]``: their mean in row 0, then their covariance. Taken from the rows'
        un-rotated queries without the prompt's first four, which are outliers; turned by the mean rotation of the
        ``horizon`` positions after the prompt; and scaled so that the product with a stored key is a logit.
    threshold : float
        Only for ``density``, in (0, 1].
    horizon : int
        Only for ``queries``: how many coming positions are looked at.
    """

    rows: Rows
    window: int = 0
    layers: Literal["all", "last"] = "all"
    statistic: Statistic = "sum"
    threshold: float = 0.01
    horizon: int = 512

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise InputError(f"a density's threshold must lie in (0, 1], not {self.threshold:g}")
        if self.horizon < 1:
            raise InputError(f"the horizon of coming positions must be at least 1, not {self.horizon}")


@dataclass(frozen=True)
class Evidence:
    """What was observed, by request and layer; :class:`EvidenceRequest` says what the tensors are.

    Over the query heads of a KV group, ``A`` and densities are averaged. Rows run over the whole prompt; columns over
    the tokens the cache holds.
    """

    column_sums: dict[EvidenceRequest, dict[int, torch.Tensor]] = field(default_factory=dict)

    def of(self, request: EvidenceRequest, layer: int) -> torch.Tensor:
        """What ``request`` saw in ``layer``.

        Raises
        ------
        EvidenceError
            It was not observed there, or attention overflowed (NaN or infinity).
        """
        try:
            seen = self.column_sums[request][layer]
        except KeyError:
            raise EvidenceError(
                f"attention of the {request.rows!r} rows was not observed in layer {layer}; "
                "pass the recipe to prefill(..., recipe=...) so that it knows what to look at"
            ) from None
        if not bool(seen.isfinite().all()):
            raise EvidenceError(
                f"attention of layer {layer} holds NaN or infinity, most likely because float16 overflowed; "
                "load the model with dtype='bfloat16' or 'float32'"
            )
        return seen


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
