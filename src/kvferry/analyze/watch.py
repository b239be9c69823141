"""Attention of a whole prompt, seen while it is read: sums, survivors and entropy, in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.running import Array
from kvferry.cache import PromptLayout
from kvferry.evidence import EvidenceRequest
from kvferry.lazy import torch
from kvferry.models.attention import rows_of
from kvferry.models.blockwise import HIDDEN, Rule, blocks

ROWS = ("question", "post_vision", "visual")
"""Groups of queries: the question's tokens, all that follow the last visual token, the visual tokens."""
QUESTION, POST_VISION, VISUAL = range(3)
COLUMNS = ("visual", "text")
"""Groups of keys."""
THRESHOLD = 0.01
"""VL-Cache's ``p`` (arXiv 2410.23317): an entry survives when it reaches this share of its row's largest."""


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

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, rule: Rule) -> None:
        """Look at one layer; ``query`` and ``key`` are ``[heads, n, d]``, post-rotary."""
        self._layers[layer] = look(query, key, self._groups.to(key.device), self._split.to(key.device), rule)

    @property
    def layers(self) -> tuple[LayerAttention, ...]:
        """What was seen, layer by layer."""
        return tuple(self._layers[i] for i in sorted(self._layers))


def look(
    query: torch.Tensor, key: torch.Tensor, groups: torch.Tensor, split: torch.Tensor, rule: Rule
) -> LayerAttention:
    """Attention of one layer by groups of rows and columns, a block of rows at a time.

    Parameters
    ----------
    query : ``[query_heads, n, d]``
    key : ``[kv_heads, n, d]``
    groups : float32 ``[3, n]``
        One where a row belongs to the group.
    split : float32 ``[n, 2]``
        One where a column is visual, one where it is text.
    """
    wanted = groups.any(dim=0).nonzero()[:, 0].cpu()
    columns = torch.zeros(len(groups), key.shape[1], device=key.device)
    visible, survived = torch.zeros(2, len(groups), 2, device=key.device)
    entropy = torch.zeros(len(groups), device=key.device)
    for some, logits in blocks(query, key, wanted, rule):
        share, seen = groups[:, wanted[some]], logits.shape[-1]
        attention, allowed = rule.attention(logits).flatten(0, 1), logits.flatten(0, 1) > HIDDEN
        strong = allowed & (attention >= THRESHOLD * attention.amax(-1, keepdim=True))
        columns[:, :seen] += share @ attention.mean(0)
        visible += share @ (allowed.float().mean(0) @ split[:seen])
        survived += share @ (strong.float().mean(0) @ split[:seen])
        even = allowed.sum(-1).clamp_min(2).log()
        entropy += share @ (torch.special.entr(attention).sum(-1) / even).mean(0)
    counts = groups.sum(1)
    parts = (counts, columns, visible, survived, entropy / counts)
    return LayerAttention(*(x.cpu().numpy().astype(np.float64) for x in parts))
