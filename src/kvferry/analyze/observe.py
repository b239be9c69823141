"""One prefill of one question, and everything that the measurements want to know about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.analyze.running import Array
from kvferry.analyze.source import Asked
from kvferry.analyze.watch import POST_VISION, AttentionWatch, LayerAttention
from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Prefilled
from kvferry.lazy import torch
from kvferry.models.vlm import VLM
from kvferry.recipe import Recipe
from kvferry.rope import Rotary
from kvferry.selection import SCORERS, SINKS, Selection, evict, kept_count

FRACTIONS = (0.75, 0.5, 0.25)
"""Kept shares at which selections are compared."""
DROPS = (("visual", 0.5), ("text", 0.5), ("visual", 0.25), ("text", 0.25), ("visual", 0.0))
"""What is dropped after prefill to see what the next token loses: a modality, and the share of it that stays."""

UNRANKED = ("full", "none")
"""Selections without a choice, of which there is nothing to compare."""
NEEDED, ALONE, UNSAID = 1, 0, -1
"""Whether a question needs its picture, in numbers: yes, no (the text alone answers), nobody said."""

Choices = dict[str, dict[float, Selection]]
"""Kept tokens by scorer and fraction."""


@dataclass(frozen=True)
class Observation:
    """One question as one model read it.

    Parameters
    ----------
    attention : tuple of LayerAttention
        Empty for a model that is only compared against.
    choices : dict
        See :data:`Choices`.
    logits : float32 ``[1 + len(DROPS), vocabulary]`` or None
        Of the next token from the full cache, then after each of :data:`DROPS`; None without both modalities.
    """

    asked: Asked
    prefilled: Prefilled
    attention: tuple[LayerAttention, ...]
    rotary: tuple[Rotary | None, ...]
    choices: Choices
    logits: torch.Tensor | None

    @property
    def cache(self) -> KVCache:
        """The full cache."""
        return self.prefilled.cache

    @property
    def visual(self) -> npt.NDArray[np.bool_]:
        """True on visual tokens, ``[length]``."""
        return self.cache.layout.visual[: self.cache.length]

    @property
    def needs(self) -> int:
        """:data:`NEEDED`, :data:`ALONE` or :data:`UNSAID`."""
        return UNSAID if self.asked.needs_image is None else int(self.asked.needs_image)


class Subject:
    """A model under analysis: it reads each question once.

    Parameters
    ----------
    scorers : sequence of str
        Names in :data:`kvferry.selection.SCORERS`; by default all that rank tokens, at their default options.
    """

    def __init__(self, vlm: VLM, scorers: tuple[str, ...] | None = None) -> None:
        self.vlm = vlm
        self.scorers = scorers or tuple(x for x in SCORERS if x not in UNRANKED)
        self._recipes = {name: {f: Recipe(SCORERS[name](), f) for f in FRACTIONS} for name in self.scorers}
        rows = [r for by_fraction in self._recipes.values() for r in by_fraction[FRACTIONS[0]].requests]
        self._requests = tuple(dict.fromkeys(rows))
        self._rotary = vlm.rotary

    def observe(self, asked: Asked) -> Observation:
        """Everything."""
        watch = AttentionWatch()
        prefilled = self._prefill(asked, watch)
        attention = watch.layers
        logits = self._logits(prefilled, attention)
        return Observation(asked, prefilled, attention, self._rotary, self._choices(prefilled), logits)

    def choose(self, asked: Asked) -> Observation:
        """Only what each scorer keeps."""
        prefilled = self._prefill(asked, None)
        return Observation(asked, prefilled, (), self._rotary, self._choices(prefilled), None)

    def _prefill(self, asked: Asked, watch: AttentionWatch | None) -> Prefilled:
        images = asked.images if self.vlm.has_vision else ()
        try:
            return self.vlm.prefill(images, asked.question, context=asked.context, requests=self._requests, watch=watch)
        except InputError as error:
            raise InputError(f"{asked.name}: {error}") from None

    def _choices(self, prefilled: Prefilled) -> Choices:
        return {name: {f: r.select(prefilled) for f, r in row.items()} for name, row in self._recipes.items()}

    def _logits(self, prefilled: Prefilled, attention: tuple[LayerAttention, ...]) -> torch.Tensor | None:
        cache = prefilled.cache
        visual = cache.layout.visual[: cache.length]
        if not visual.any() or visual.all():
            return None
        scores = [layer.columns[POST_VISION, : cache.length] for layer in attention]
        caches = [cache, *(evict(cache, _thinned(cache, scores, name, share)) for name, share in DROPS)]
        return torch.cat([self.vlm.score(x, []) for x in caches]).cpu()


def _thinned(cache: KVCache, scores: list[Array], name: str, share: float) -> Selection:
    """All of the other modality, and of this one the ``share`` that later tokens look at most in each layer.

    The sinks stay, except where nothing of the modality is to stay.
    """
    mine = cache.layout.visual[: cache.length] == (name == "visual")
    if share:
        mine[:SINKS] = False
    candidates = np.flatnonzero(mine)
    positions = []
    for layer, score in zip(cache, scores, strict=True):
        kept = ~mine
        if share and len(candidates):
            best = np.argsort(-score[candidates], kind="stable")[: kept_count(share, len(candidates))]
            kept[candidates[best]] = True
        index = torch.from_numpy(np.flatnonzero(kept)).to(layer.positions.device)
        positions.append(index.expand(len(layer.positions), -1).contiguous())
    return Selection(tuple(positions), tuple(torch.ones_like(x, dtype=torch.float32) for x in positions))
