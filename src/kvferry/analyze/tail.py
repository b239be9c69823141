"""The long tail: how much of the question's attention the best few visual tokens hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir, Running
from kvferry.analyze.watch import QUESTION

SHARES = np.linspace(0.0, 1.0, 101)
"""Top shares of tokens at which the curve is known."""
TOP = 10
"""Index in :data:`SHARES` of the top 10 %."""


def tail_curve(weights: Array) -> Array:
    """Share of the sum that the largest ``x`` of ``weights`` ``[m]`` hold, for ``x`` in :data:`SHARES`.

    Between whole tokens the curve is straight, so that even weights give the diagonal exactly.
    """
    ordered = np.sort(weights)[::-1]
    total = ordered.sum()
    if not len(ordered) or total <= 0:
        return np.full(len(SHARES), np.nan)
    held = np.concatenate([[0.0], np.cumsum(ordered) / total])
    curve: Array = np.interp(SHARES, np.linspace(0.0, 1.0, len(held)), held)
    return curve


@dataclass(frozen=True)
class TailResult:
    """Long-tail curves of the question's attention.

    Parameters
    ----------
    visual, visual_margin : ``[layers, 101]``
        Over the visual tokens.
    text : ``[layers, 101]``
        Over the text tokens, for comparison.
    samples : ``[n]``
        Per prompt with a picture: share held by the top 10 % of visual tokens, averaged over layers.
    """

    visual: Array
    visual_margin: Array
    text: Array
    samples: Array


class Tail:
    """Adds up curves, one per prompt and layer, of attention summed over the question's rows."""

    def __init__(self) -> None:
        self._visual, self._text = Running(), Running()
        self._samples = Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt."""
        visual = seen.cache.layout.visual
        curves = np.stack([tail_curve(x.columns[QUESTION, visual]) for x in seen.attention])
        self._visual.add(curves)
        self._text.add(np.stack([tail_curve(x.columns[QUESTION, ~visual]) for x in seen.attention]))
        if visual.any():
            self._samples.add(curves[:, TOP].mean())

    def result(self) -> TailResult:
        """What was found so far."""
        return TailResult(self._visual.mean, self._visual.margin, self._text.mean, self._samples.rows)
