"""What was kept where, in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvferry.cache import KVCache, Modality, PromptLayout


@dataclass(frozen=True)
class Share:
    """Of ``tokens`` prompt tokens of one modality a head keeps ``kept``, the mean over all layers and heads."""

    kept: float
    tokens: int


@dataclass(frozen=True)
class Summary:
    """What a selection or a cache keeps.

    Parameters
    ----------
    length : int
        Prompt tokens the cache stands for.
    layers : tuple of float
        Tokens a head keeps, per layer: the mean over its heads.
    fewest, most : tuple of int
        Of the heads of each layer.
    modalities : dict of str to Share
        By the names of :class:`kvferry.cache.Modality`, in lower case; only those that the prompt has.
    """

    length: int
    layers: tuple[float, ...]
    fewest: tuple[int, ...]
    most: tuple[int, ...]
    modalities: dict[str, Share]

    def __str__(self) -> str:
        mean = sum(self.layers) / len(self.layers)
        where = f"{min(self.layers):g} to {max(self.layers):g} by layer, {min(self.fewest)} to {max(self.most)} by head"
        spread = "" if min(self.fewest) == max(self.most) else f" ({where})"
        parts = [f"{share.kept:.4g} of {share.tokens} {name}" for name, share in self.modalities.items()]
        return f"{mean:.4g} of {self.length} tokens per layer{spread}: {', '.join(parts)}"


def summarise(heads: Sequence[Sequence[torch.Tensor]], layout: PromptLayout, length: int) -> Summary:
    """The summary of what every head of every layer keeps: int64 positions of any shape."""
    sizes = [[x.numel() for x in layer] for layer in heads]
    modality = torch.from_numpy(layout.modality[:length])
    everything = torch.cat([modality[x.reshape(-1).cpu()] for layer in heads for x in layer])
    count = sum(map(len, heads))
    return Summary(
        length=length,
        layers=tuple(sum(layer) / len(layer) for layer in sizes),
        fewest=tuple(map(min, sizes)),
        most=tuple(map(max, sizes)),
        modalities={
            kind.name.lower(): Share(int((everything == kind).sum()) / count, int((modality == kind).sum()))
            for kind in Modality
            if bool((modality == kind).any())
        },
    )


def summarise_cache(cache: KVCache) -> Summary:
    """The summary of what a cache holds."""
    return summarise([[x.positions for x in layer.split()] for layer in cache], cache.layout, cache.length)
