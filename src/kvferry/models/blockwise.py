"""Softmax attention in blocks of query rows: what it looks like and what it gives, without an ``n x n`` matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

ROWS_PER_BLOCK = 64
LOGITS_PER_BLOCK = 1 << 24
"""Many heads and long prompts make blocks of fewer rows, so that one takes at most 64 MiB."""
HIDDEN = torch.finfo(torch.float32).min
"""The logit of a hidden key. Finite, so that a padding token, which sees nothing, looks everywhere and is not NaN."""


@dataclass(frozen=True)
class Rule:
    """How one layer turns queries and keys into attention.

    Parameters
    ----------
    scaling : float
        Multiplies the logits.
    mask : bool or additive float ``[1 or query_heads, queries, keys]``, optional
    causal : bool
        Whether, without a mask, query ``i`` sees keys up to ``i`` only.
    softcap : float, optional
        Logits ``x`` become ``softcap * tanh(x / softcap)`` (Gemma 2, arXiv 2408.00118).
    sinks : ``[query_heads]``, optional
        Logits of one more key that every query sees and that has no value (gpt-oss, arXiv 2508.10925).
    dropped : bool ``[1 or kv_heads, keys]``, optional
        Keys that no query sees but their own token's.
    """

    scaling: float
    mask: torch.Tensor | None = None
    causal: bool = True
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def logits(self, query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of some queries, :data:`HIDDEN` where a key is hidden.

        Parameters
        ----------
        query : ``[query_heads, queries, d]``, post-rotary
        key : float32 ``[kv_heads, keys, d]``, post-rotary
        rows : int64 ``[r]``, ascending, on the CPU

        Returns
        -------
        float32 ``[kv_heads, group, r, seen]``: keys beyond ``seen`` are hidden from all of these queries.
        """
        (heads, keys, d), r = key.shape, len(rows)
        only_past = self.causal and self.mask is None
        first, seen = int(rows[0]), int(rows[-1]) + 1 if only_past else keys
        rows = rows.to(key.device)
        some = (query[:, rows].float() * self.scaling).reshape(heads, -1, d)
        logits = (some @ key[:, :seen].transpose(1, 2)).view(heads, -1, r, seen)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None:
            logits = _hide(logits, self.mask[:, rows])
        elif only_past:
            future = torch.arange(first, seen, device=key.device) > rows[:, None]
            logits[..., first:].masked_fill_(future, HIDDEN)
        if self.dropped is not None:
            others = torch.arange(seen, device=key.device) != rows[:, None]
            logits.masked_fill_(self.dropped[:, None, None, :seen] & others, HIDDEN)
        return logits

    def attention(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax of :meth:`logits`; with sinks the rows sum to less than one."""
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.float().view(*logits.shape[:2], 1, 1)
        total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), sinks)
        return (logits - total).exp()


def _hide(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mask = mask.view(*logits.shape) if mask.shape[0] > 1 else mask.unsqueeze(0)
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, HIDDEN)
    # Additive masks hide by the dtype's lowest number, which in float16 a large logit could outweigh.
    return logits.add_(mask).masked_fill_(mask <= torch.finfo(mask.dtype).min / 2, HIDDEN)


def column_sums(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Weighted column sums of softmax attention over some query rows.

    Parameters
    ----------
    query : ``[query_heads, n, d]``, post-rotary
    key : ``[kv_heads, n, d]``, post-rotary
    rows : int64 ``[r]``, ascending, on the CPU
        Which queries to look at.
    weights : float32 ``[requests, r]``
        What each row counts in each sum.

    Returns
    -------
    float32 ``[requests, kv_heads, n]``, the mean over the query heads of each group.
    """
    heads, n, _ = key.shape
    group = query.shape[0] // heads
    weights = weights.to(key.device) / group
    sums = torch.zeros(heads, len(weights), n, device=key.device)
    for some, logits in blocks(query, key, rows, rule):
        columns = weights[:, some].repeat(1, group) @ rule.attention(logits).flatten(1, 2)
        sums[..., : logits.shape[-1]] += columns
    return sums.transpose(0, 1)


def densities(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    thresholds: Sequence[float],
    rule: Rule,
) -> torch.Tensor:
    """How many attention entries are not small beside the largest of their row, and how many there are.

    An entry counts where ``A[q, j] >= threshold * max_j A[q, j]`` (VL-Cache, arXiv 2410.23317, section 4.1), among
    the entries that the row may see. Attention's ratios are differences of logits, so no softmax is needed. What
    several passes over a prompt counted adds up; :func:`density` makes shares of it.

    Parameters
    ----------
    query, key, rows, weights
        See :func:`column_sums`; weights are 0 or 1.
    thresholds : sequence of float
        One per request.

    Returns
    -------
    float32 ``[requests, 2, kv_heads, group]``: large entries, then visible ones.
    """
    weights = weights.to(key.device)
    large = torch.zeros(len(weights), query.shape[0], device=key.device)
    visible = torch.zeros_like(large)
    for some, logits in blocks(query, key, rows, rule):
        logits = logits.flatten(0, 1)
        largest = logits.amax(-1, keepdim=True)
        overflow = 0 * largest.squeeze(-1)  # NaN where a logit is NaN or infinite, which comparing would hide
        visible += weights[:, some] @ ((logits > HIDDEN).sum(-1) + overflow).T
        for index, threshold in enumerate(thresholds):
            large[index] += (logits >= largest + math.log(threshold)).sum(-1).float() @ weights[index, some]
    return torch.stack([large, visible], dim=1).view(len(weights), 2, key.shape[0], -1)


def density(counts: torch.Tensor) -> torch.Tensor:
    """Shares ``[..., kv_heads]`` of :func:`densities`' counts, the mean over the query heads of each group."""
    large, visible = counts.unbind(-3)
    return (large / visible).mean(-1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The output of attention under a rule that ``scaled_dot_product_attention`` has no form for.

    Parameters
    ----------
    query : ``[query_heads, queries, d]``
    key, value : ``[kv_heads, keys, d]``

    Returns
    -------
    ``[query_heads, queries, d]`` in the dtype of ``value``.
    """
    outputs = []
    for _, logits in blocks(query, key, torch.arange(query.shape[1]), rule):
        shares = rule.attention(logits).flatten(1, 2).to(value.dtype)
        output = shares @ value[:, : logits.shape[-1]]
        outputs.append(output.view(query.shape[0], -1, value.shape[-1]))
    return torch.cat(outputs, dim=1)


def blocks(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, rule: Rule
) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few of ``rows`` at a time, as a slice, and their logits."""
    keys = key.float()
    size = max(1, min(ROWS_PER_BLOCK, LOGITS_PER_BLOCK // (query.shape[0] * key.shape[1])))
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        yield some, rule.logits(query, keys, rows[some])
