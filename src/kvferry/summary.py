"""What was kept where, in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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
    scored : tuple of float
        Per layer, how many of the tokens that a head keeps the scorer chose
        (:attr:`kvferry.selection.Selection.scored`). Empty where none had a choice, and for a decoded cache, since a
        stream does not say; summaries are compared without it.
    """

    length: int
    layers: tuple[float, ...]
    fewest: tuple[int, ...]
    most: tuple[int, ...]
    modalities: dict[str, Share]
    scored: tuple[float, ...] = field(default=(), compare=False)

    @property
    def unscored_layers(self) -> int:
        """In how many layers tokens were dropped although the scorer chose none of those that stayed."""
        return sum(not chosen and kept < self.length for chosen, kept in zip(self.scored, self.layers, strict=False))

    @property
    def scored_share(self) -> float | None:
        """Of the tokens that stay, the share that the scorer chose; None where :attr:`scored` is empty."""
        return sum(self.scored) / sum(self.layers) if self.scored else None

    @property
    def note(self) -> str:
        """What to know about the selection; empty where the scorer chose in every layer."""
        if not self.unscored_layers:
            return ""
        return (
            f"in {self.unscored_layers} of {len(self.layers)} layers the scorer chose no token: the first tokens and "
            "what is guaranteed fill the budget; keep more"
        )

    def __str__(self) -> str:
        mean = sum(self.layers) / len(self.layers)
        where = f"{min(self.layers):g} to {max(self.layers):g} by layer, {min(self.fewest)} to {max(self.most)} by head"
        spread = "" if min(self.fewest) == max(self.most) else f" ({where})"
        parts = [f"{share.kept:.4g} of {share.tokens} {name}" for name, share in self.modalities.items()]
        note = f"; {self.note}" if self.note else ""
        return f"{mean:.4g} of {self.length} tokens per layer{spread}: {', '.join(parts)}{note}"


def summarise(
    heads: Sequence[Sequence[npt.NDArray[np.int64]]],
    layout: PromptLayout,
    length: int,
    scored: tuple[float, ...] = (),
) -> Summary:
    """The summary of what every head of every layer keeps: int64 positions ``[kept]``."""
    sizes = [[x.size for x in layer] for layer in heads]
    modality = layout.modality[:length]
    everything = np.concatenate([modality[x] for layer in heads for x in layer])
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
        scored=scored,
    )


def summarise_cache(cache: KVCache) -> Summary:
    """The summary of what a cache holds."""
    heads = [[x.positions.flatten().cpu().numpy() for x in layer.split()] for layer in cache]
    return summarise(heads, cache.layout, cache.length, cache.scored)
