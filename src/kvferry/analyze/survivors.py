"""Which tokens survive: their share by modality, and where they stand in the picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvferry.analyze.observe import FRACTIONS, Observation
from kvferry.analyze.overlap import members
from kvferry.analyze.running import Array, Running
from kvferry.overlay import kept_share
from kvferry.pictures import open_picture
from kvferry.selection import evict

DRAWN_FRACTION = 0.25
DRAWN_PROMPTS = 3


@dataclass(frozen=True)
class Drawn:
    """One prompt's first picture, and for each scorer the share of layers and heads that keep each of its tokens."""

    question: str
    picture: Any = field(repr=False)
    shares: dict[str, Array]


@dataclass(frozen=True)
class SurvivorsResult:
    """What stays.

    Parameters
    ----------
    scorers : tuple of str
    kept : ``[scorers, fractions, 2]``
        Share of visual and of text tokens that stay, over layers, heads and prompts.
    drawn : tuple of Drawn
        The first prompts whose pictures have a token grid, at a kept share of :data:`DRAWN_FRACTION`.
    """

    scorers: tuple[str, ...]
    kept: Array
    drawn: tuple[Drawn, ...]


class Survivors:
    """Counts what stays and remembers the first few pictures."""

    def __init__(self, scorers: tuple[str, ...]) -> None:
        self._scorers = scorers
        self._kept = Running()
        self._drawn: list[Drawn] = []

    def add(self, seen: Observation) -> None:
        """One prompt."""
        self._kept.add([[_by_modality(seen, s, f) for f in FRACTIONS] for s in self._scorers])
        if len(self._drawn) < DRAWN_PROMPTS and seen.cache.layout.grids and seen.asked.images:
            self._drawn.append(self._draw(seen))

    def _draw(self, seen: Observation) -> Drawn:
        chosen = {s: seen.choices[s][DRAWN_FRACTION] for s in self._scorers}
        shares = {s: kept_share(evict(seen.cache, x)).astype(np.float64) for s, x in chosen.items()}
        return Drawn(seen.asked.question, open_picture(seen.asked.images[0]), shares)

    def result(self) -> SurvivorsResult:
        """What was found so far."""
        return SurvivorsResult(self._scorers, self._kept.mean, tuple(self._drawn))


def _by_modality(seen: Observation, scorer: str, fraction: float) -> list[float]:
    share = members(seen.choices[scorer][fraction], seen.cache.length).mean((0, 1))
    return [float(share[x].mean()) if x.any() else np.nan for x in (seen.visual, ~seen.visual)]
