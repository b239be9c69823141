"""Which pieces of the pictures matter for a question: one set for the whole prompt, from any scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import EvidenceError, RecipeError
from kvferry.lazy import torch
from kvferry.recipe import Recipe
from kvferry.selection import Selection, kept_count
from kvferry.selection.vlcache import VLCache

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.evidence import Prefilled

DEFAULT_SCORER = VLCache()
"""Attention after the pictures. Of ten scorers the best on the validation split when testbed/edge ranks for
testbed/cloud: 58 of 60 right at 25 %, 56 at 10 %; the next, leaveout, 57 and 55; keydiff 57 and 50."""

Mask = npt.NDArray[np.bool_]


def checked_ranking(recipe: Recipe, where: str) -> Recipe:
    """``recipe`` if it says no more than a scorer and a fraction; RecipeError otherwise."""
    plain = not hasattr(recipe.selection, "select") and recipe.bytes is None
    if not plain or recipe != Recipe(recipe.selection, recipe.fraction):
        raise RecipeError(
            f"{where} takes a scorer and a fraction of the visual tokens, such as keydiff@0.25, not {str(recipe)!r}: "
            "one set of positions has no budget per layer, no policy, no merge and no codec"
        )
    return recipe


def kept_visual(prefilled: Prefilled, recipe: Recipe) -> Mask:
    """The visual tokens to keep, bool ``[visual tokens]``: ``recipe.fraction`` of them, exact to a token.

    One model's layers and heads have no counterpart in another's, so their rankings become one: in every head the
    scores of the visual tokens are divided by their mean magnitude, so that all heads have the same say whatever the
    scorer's unit, and added up over heads and layers.

    Raises
    ------
    EvidenceError
        The scores hold NaN.
    """
    cache = prefilled.cache
    visual = torch.from_numpy(cache.layout.visual[: cache.length])
    count = int(visual.sum())
    mask = np.zeros(count, dtype=np.bool_)
    if not count:
        return mask
    total = torch.zeros(count, dtype=torch.float64)
    for layer, score in zip(cache, recipe.selection.score(cache, prefilled.evidence), strict=True):
        mine = score.double().cpu()[:, visual]
        share = mine / mine.abs().mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        total += share.sum(0) * (layer.heads / len(mine))
    if bool(total.isnan().any()):
        raise EvidenceError("the scores hold NaN; load the model in bfloat16 or float32 (float16 may have overflowed)")
    mask[total.topk(kept_count(recipe.fraction, count)).indices.numpy()] = True
    return mask


def selection_of(prefilled: Prefilled | KVCache, mask: Mask) -> Selection:
    """All text and the visual tokens in ``mask``, alike in every layer and head."""
    cache: Any = getattr(prefilled, "cache", prefilled)
    keep = ~cache.layout.visual[: cache.length]
    keep[cache.layout.visual[: cache.length]] = mask
    where = torch.from_numpy(np.flatnonzero(keep))
    positions = tuple(where.expand(layer.heads, -1).contiguous().to(layer.keys.device) for layer in cache)
    return Selection(positions, tuple(torch.ones_like(row, dtype=torch.float32) for row in positions))
