"""The core step: scores, a count per layer and a modality policy in; kept positions out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvferry.cache import KVCache
from kvferry.errors import EvidenceError, InputError
from kvferry.evidence import Evidence
from kvferry.lazy import torch
from kvferry.selection.base import SINKS, Scorer, Selection
from kvferry.selection.budgets import Budget
from kvferry.selection.eviction import rising
from kvferry.selection.modality import Policy, Quota
from kvferry.selection.none import NoVisual

Visual = npt.NDArray[np.bool_]

SCORED = 0.25
"""Of the tokens that a head keeps, the share that the scorer chooses at least; its recent tokens yield to that."""


def choose(
    cache: KVCache, evidence: Evidence, scorer: Scorer, budget: Budget, policy: Policy, fraction: float
) -> Selection:
    """The tokens that stay.

    In every head the first :data:`SINKS` tokens stay, then what the policy guarantees to each modality, then the
    scorer's most recent tokens, then those with the highest scores. Recent tokens leave the scorer :data:`SCORED` of
    what the head keeps, or all that the sinks leave where that is less; what it came to is :attr:`Selection.scored`.

    Raises
    ------
    BudgetError
        The fraction is too small for what must stay; it names the smallest that works for this prompt.
    EvidenceError
        Evidence is missing, or the scores hold NaN.
    InputError
        The budget shares tokens out among heads, and the scorer ranks all heads alike.
    """
    visual = cache.layout.visual[: cache.length]
    counts = budget.counts(cache, evidence, fraction, least_count(policy, visual))
    if visual.any() and policy.skips(cache, evidence):
        return NoVisual().select(cache, evidence)
    positions, importance, per_head, scored = [], [], [], []
    scores = scorer.score(cache, evidence)
    if budget.ranks_jointly:
        scores = [torch.stack([x.float().sum(0) for x in scores]).sum(0, keepdim=True)] * len(scores)
    for index, (score, keep) in enumerate(zip(scores, counts, strict=True)):
        recent = recent_count(scorer, cache, keep)
        ranked = _ranked(score, keep, recent, index)
        if visual.any():
            _guarantee(ranked, keep, visual, policy)
        heads = cache.layers[index].heads
        mask = _top(ranked, keep, budget.least_per_head(keep), heads)
        lengths = mask.sum(1).tolist()
        ragged = len(set(lengths)) > 1
        shape, rows = ((1, -1), 1) if ragged else ((len(mask), keep), heads)
        positions.append(mask.nonzero()[:, 1].view(shape).expand(rows, -1).contiguous())
        importance.append(ranked[mask].view(shape).expand(rows, -1).contiguous())
        per_head.append(tuple(lengths) if ragged else ())
        scored.append(float((mask & ~_given(keep, recent, visual, policy).to(mask.device)).sum()) / len(mask))
    return Selection(tuple(positions), tuple(importance), tuple(per_head) if any(per_head) else (), tuple(scored))


def recent_count(scorer: Scorer, cache: KVCache, keep: int) -> int:
    """How many of the most recent tokens stay whatever their score, where a head keeps ``keep``."""
    asked = int(scorer.recent(keep)) if hasattr(scorer, "recent") else 0
    unseen = int(scorer.unseen(cache)) if hasattr(scorer, "unseen") else 0
    room = keep - min(SINKS, keep) - math.ceil(SCORED * keep)
    return max(0, min(max(asked, unseen), room))


def _given(keep: int, recent: int, visual: Visual, policy: Policy) -> torch.Tensor:
    """What stays without a score having a say, bool ``[length]``: sinks, recent tokens, a modality that stays whole."""
    given = np.zeros(len(visual), np.bool_)
    given[: min(SINKS, keep)] = True
    given[len(visual) - recent :] = True
    if visual.any():
        quota = policy.quota(keep, int((~visual).sum()), int(visual.sum()))
        given |= ~visual if quota.text >= (~visual).sum() else False
        given |= visual if quota.visual >= visual.sum() else False
    return torch.from_numpy(given)


def least_count(policy: Policy, visual: Visual) -> int:
    """The smallest count for one layer that leaves room for everything the policy and the sinks claim."""
    pictures = int(visual.sum())

    def must(keep: int) -> int:
        text_sinks, visual_sinks = _sinks(visual, keep)
        quota = policy.quota(keep, len(visual) - pictures, pictures) if pictures else Quota()
        return max(quota.text, text_sinks) + visual_sinks

    return next(keep for keep in range(1, len(visual) + 1) if must(keep) <= keep)


def _sinks(visual: Visual, keep: int) -> tuple[int, int]:
    """How many of the sinks are text, and how many are visual tokens."""
    first = visual[: min(SINKS, keep)]
    return int((~first).sum()), int(first.sum())


def _ranked(score: torch.Tensor, keep: int, recent: int, layer: int) -> torch.Tensor:
    """Finite scores, with ``inf`` on the sinks and :func:`rising` numbers on the recent tokens."""
    if bool(score.isnan().any()):
        raise EvidenceError(
            f"the scores of layer {layer} hold NaN; look for what broke the prefill (a float16 overflow is the usual "
            "cause: load the model in bfloat16)"
        )
    largest = torch.finfo(torch.float32).max
    ranked = score.float().clamp(-largest, largest)
    ranked[:, ranked.shape[1] - recent :] = rising(recent, ranked)
    ranked[:, : min(SINKS, keep)] = torch.inf
    return ranked


def _guarantee(ranked: torch.Tensor, keep: int, visual: Visual, policy: Policy) -> None:
    """Raise what the policy guarantees to ``inf``, and lower what it bars to ``-inf``."""
    quota = policy.quota(keep, int((~visual).sum()), int(visual.sum()))
    text_sinks, visual_sinks = _sinks(visual, keep)
    text = max(quota.text, text_sinks)
    pictures = min(max(quota.visual, visual_sinks), keep - text)
    where = torch.from_numpy(visual).to(ranked.device)
    _raise(ranked, ~where, text)
    _raise(ranked, where, pictures)
    if quota.visual_first:
        ranked.masked_fill_(~where & (ranked < torch.inf), -torch.inf)


def _raise(ranked: torch.Tensor, where: torch.Tensor, count: int) -> None:
    """Set the ``count`` highest tokens among ``where`` (bool ``[length]``) to ``inf``, in every row."""
    columns = where.nonzero()[:, 0]
    best = ranked[:, columns].topk(count, dim=-1).indices
    ranked.scatter_(1, columns[best], torch.inf)


def _top(ranked: torch.Tensor, keep: int, least: int | None, heads: int) -> torch.Tensor:
    """The highest ``keep`` per row; or, where each head is owed ``least``, the highest ``keep * rows`` of all rows."""
    mask = torch.zeros_like(ranked, dtype=torch.bool)
    if least is None:
        return mask.scatter_(1, ranked.topk(keep, dim=-1).indices, True)
    if len(ranked) < heads:
        raise InputError(
            "this selection ranks all heads alike, so budget=head has nothing to share out; leave it out, or choose "
            "a selection that ranks per head, such as snapkv or knorm"
        )
    _raise(ranked, torch.ones_like(mask[0]), least)
    best = ranked.view(-1).topk(keep * len(ranked)).indices
    return mask.view(-1).scatter_(0, best, True).view_as(ranked)
