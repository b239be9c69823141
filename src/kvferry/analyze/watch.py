"""Attention of a whole prompt, seen while it is read: sums, survivors and entropy, in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvferry.analyze.running import Array
from kvferry.cache import PromptLayout
from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import rows_of

ROWS = ("question", "post_vision", "visual")
"""Groups of queries: the question's tokens, all that follow the last visual token, the visual tokens."""
QUESTION, POST_VISION, VISUAL = range(3)
COLUMNS = ("visual", "text")
"""Groups of keys."""
THRESHOLD = 0.01
"""VL-Cache's ``p`` (arXiv 2410.23317): an entry survives when it reaches this share of its row's largest."""
ROWS_PER_BLOCK = 64


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention, averaged over query heads, for the groups of rows in :data:`ROWS`.

    Parameters
    ----------
    rows : ``[3]``
        Queries in each group.
    columns : ``[3, n]``
        Sum over the group's rows of the attention that each key gets.
    visible, survived : ``[3, 2]``
        Entries that the mask lets the group's rows see, by the key's modality (:data:`COLUMNS`), and how many of
        them reach the threshold.
    entropy : ``[3]``
        Mean over rows of the row's entropy over the logarithm of how many keys it sees: 1 is even, 0 a single key.
    """

    rows: Array
    columns: Array
    visible: Array
    survived: Array
    entropy: Array


class AttentionWatch:
    """Sees one prompt at a time; a :class:`kvferry.models.prefill.Watch`."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerAttention] = {}

    def start(self, layout: PromptLayout) -> None:
        """Forget the last prompt; know what is what in the next."""
        wanted = [rows_of(EvidenceRequest(name), layout) for name in ("question", "post_vision")]
        self._groups = torch.from_numpy(np.stack([*wanted, layout.visual]).astype(np.float32))
        self._split = torch.from_numpy(np.stack([layout.visual, ~layout.visual], axis=1).astype(np.float32))
        self._layers = {}

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        causal: bool,
    ) -> None:
        """Look at one layer; ``query`` and ``key`` are ``[1, heads, n, d]``, post-rotary."""
        self._layers[layer] = look(
            query[0],
            key[0],
            self._groups.to(key.device),
            self._split.to(key.device),
            scaling=scaling,
            mask=None if mask is None else mask[0],
            causal=causal,
        )

    @property
    def layers(self) -> tuple[LayerAttention, ...]:
        """What was seen, layer by layer."""
        return tuple(self._layers[i] for i in sorted(self._layers))


def look(
    query: torch.Tensor,
    key: torch.Tensor,
    groups: torch.Tensor,
    split: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = True,
) -> LayerAttention:
    """Attention of one layer by groups of rows and columns; at most :data:`ROWS_PER_BLOCK` rows exist at a time.

    Parameters
    ----------
    query : ``[query_heads, n, d]``
    key : ``[kv_heads, n, d]``
    groups : float32 ``[3, n]``
        One where a row belongs to the group.
    split : float32 ``[n, 2]``
        One where a column is visual, one where it is text.
    mask : bool or additive float ``[1 or query_heads, n, n]``, optional
    causal : bool
        Whether, without a mask, query ``i`` sees keys up to ``i`` only.
    """
    n = key.shape[1]
    keys = key.float().transpose(1, 2)
    wanted = groups.any(dim=0).nonzero()[:, 0]
    columns = torch.zeros(len(groups), n, device=key.device)
    visible, survived = torch.zeros(2, len(groups), 2, device=key.device)
    entropy = torch.zeros(len(groups), device=key.device)
    for rows in torch.split(wanted, ROWS_PER_BLOCK):
        share = groups[:, rows]
        attention, allowed = _softmax(query[:, rows], keys, rows, mask, scaling, causal)
        strong = allowed & (attention >= THRESHOLD * attention.amax(-1, keepdim=True))
        columns += share @ attention.mean(0)
        visible += share @ (allowed.float().mean(0) @ split)
        survived += share @ (strong.float().mean(0) @ split)
        even = allowed.sum(-1).clamp_min(2).log()
        entropy += share @ (torch.special.entr(attention).sum(-1) / even).mean(0)
    counts = groups.sum(1)
    parts = (counts, columns, visible, survived, entropy / counts)
    return LayerAttention(*(x.cpu().numpy().astype(np.float64) for x in parts))


def _softmax(
    query: torch.Tensor,
    keys: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some rows ``[query_heads, r, n]``, and which entries the mask allows ``[1 or query_heads, r, n]``.

    ``query`` holds those rows only; ``keys`` are ``[kv_heads, d, n]``.
    """
    kv_heads, dim, n = keys.shape
    logits = ((query.float() * scaling).reshape(kv_heads, -1, dim) @ keys).view(len(query), len(rows), n)
    if mask is None:
        seen = torch.arange(n, device=keys.device)
        allowed = (seen <= rows[:, None] if causal else torch.ones(len(rows), n, device=keys.device).bool())[None]
    elif mask.dtype == torch.bool:
        allowed = mask[:, rows]
    else:
        allowed = mask[:, rows] > torch.finfo(mask.dtype).min / 2
        logits = logits + mask[:, rows]
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1), allowed
