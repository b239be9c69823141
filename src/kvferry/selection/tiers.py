"""Kept tokens in tiers: what matters most first, so that the beginning of a stream is already of use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.lazy import torch
from kvferry.selection.base import SINKS

Order = Literal["importance", "layer", "token"]
Importance: TypeAlias = "tuple[torch.Tensor, ...]"
"""Per layer, for every token it keeps: float32 of the shape of its ``positions``."""


class Tier(NamedTuple):
    """Some or all kept tokens of one layer; ``more`` where others come later."""

    layer: int
    tokens: LayerCache
    more: bool


def in_tiers(kept: KVCache, importance: Importance | None, tiers: int, order: Order = "importance") -> Iterator[Tier]:
    """The tokens of every layer in ``tiers`` equal parts, all of them together what ``kept`` holds.

    In every head the sinks come first, then what a policy protects, then text, then visual tokens by falling score.
    Equal scores are spread evenly over the prompt. A head of fewer tokens than tiers leaves some empty; a tier that
    is empty in all heads of a layer is left out.

    Parameters
    ----------
    importance
        :attr:`kvferry.selection.Selection.importance` of what was kept; ``None`` where all tokens are alike.
    order : {"importance", "layer", "token"}
        ``importance``: the first tier of all layers, then their second. ``layer``: all tiers of the first layer, then
        those of the second. ``token``: as ``importance``, but tokens stand in the order of the prompt.
    """
    if order not in get_args(Order):
        raise InputError(f"tokens are ordered by {', '.join(get_args(Order))}, not by {order!r}")
    if tiers == 1:
        yield from (Tier(index, layer, False) for index, layer in enumerate(kept))
        return
    visual = kept.layout.visual
    parts = [
        _parts(layer, importance[index] if importance and order != "token" else None, visual, tiers, order)
        for index, layer in enumerate(kept)
    ]
    layers = range(len(parts))
    if order == "layer":
        walk = [(index, tier) for index in layers for tier in range(len(parts[index]))]
    else:
        walk = [(index, tier) for tier in range(tiers) for index in layers if tier < len(parts[index])]
    for index, tier in walk:
        yield Tier(index, parts[index][tier], tier + 1 < len(parts[index]))


def _parts(
    layer: LayerCache, importance: torch.Tensor | None, visual: npt.NDArray[np.bool_], tiers: int, order: Order
) -> list[LayerCache]:
    """The tiers of one layer that hold anything, or the layer itself where it keeps nothing."""
    heads = layer.split() if layer.counts else (layer,)
    sizes = [head.kept for head in heads]
    scores = [None] * len(heads) if importance is None else torch.split(importance, sizes, dim=1)
    dealt = []
    for head, score in zip(heads, scores, strict=True):
        rank = torch.arange(head.kept).expand(head.heads, -1) if order == "token" else _ranks(head, score, visual)
        dealt.append(rank * tiers // max(head.kept, 1))
    parts = []
    for tier in range(tiers):
        index = [(where == tier).nonzero()[:, 1].view(len(where), -1) for where in dealt]
        taken = [head.take(i.to(head.positions.device)) for head, i in zip(heads, index, strict=True)]
        if any(part.kept for part in taken):
            parts.append(LayerCache.join(taken) if layer.counts else taken[0])
    return parts or [layer]


def _ranks(head: LayerCache, importance: torch.Tensor | None, visual: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Which place each token takes in its head, int64 ``[heads, kept]``."""
    positions = head.positions.cpu().numpy()
    score = np.zeros(positions.shape, np.float32) if importance is None else importance.cpu().numpy()
    sinks, protected = positions < SINKS, np.isposinf(score)
    keys = (_reversed_bits(positions), -score, visual[positions], ~protected, ~sinks)
    order = np.lexsort(keys, axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[-1])[None], axis=-1)
    return torch.from_numpy(ranks)


def _reversed_bits(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A number per position; those of any first few in its order lie evenly among the positions."""
    reversed_ = np.zeros_like(positions)
    for bit in range(22):
        reversed_ |= (positions >> bit & 1) << (21 - bit)
    return reversed_
