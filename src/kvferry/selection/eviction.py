"""What a selection leaves of a cache."""

from __future__ import annotations

import math
from dataclasses import replace

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError
from kvferry.lazy import torch
from kvferry.selection.base import Selection


def kept_count(fraction: float, length: int) -> int:
    """Tokens that ``fraction`` of ``length`` stands for: nearest whole token, at least one."""
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"a fraction of kept tokens must lie in (0, 1], not {fraction:g}")
    return max(1, min(length, math.floor(fraction * length + 0.5)))


def rising(count: int, like: torch.Tensor) -> torch.Tensor:
    """``count`` numbers above any score, for the end of a prompt: where not all of it has room, the last stay."""
    return torch.linspace(0.5, 1.0, count, device=like.device, dtype=like.dtype) * torch.finfo(like.dtype).max


def evict(cache: KVCache, selection: Selection) -> KVCache:
    """Gather the selected tokens; what is dropped is freed. Kept keys keep their original rotation."""
    if len(selection.positions) != len(cache.layers):
        raise InputError(f"a selection of {len(selection.positions)} layers does not fit {len(cache.layers)}")
    layers = []
    for index, layer in enumerate(cache):
        wanted = selection.heads(index)
        if not layer.counts and len({x.shape[1] for x in wanted}) == 1:
            layers.append(_gather(layer, torch.cat(wanted), cache.length))
        else:
            heads = zip(layer.split(), wanted, strict=True)
            layers.append(LayerCache.join([_gather(head, row, cache.length) for head, row in heads]))
    return replace(cache, layers=tuple(layers), scored=selection.scored)


def _gather(layer: LayerCache, wanted: torch.Tensor, length: int) -> LayerCache:
    """The entries of ``layer`` (equally long heads) at the prompt positions ``wanted`` (``[kv_heads, k]``)."""
    wanted = wanted.to(layer.positions.device)
    if layer.kept == length:
        return layer.take(wanted)
    index = torch.searchsorted(layer.positions, wanted.contiguous()).clamp(max=max(layer.kept - 1, 0))
    if wanted.shape[1] > layer.kept or not torch.equal(layer.positions.gather(1, index), wanted):
        raise InputError("the selection names tokens that this cache has already dropped")
    return layer.take(index)
