"""Does Q2C tell modalities apart? How often it ranks a text token above a visual one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir
from kvferry.analyze.watch import QUESTION
from kvferry.selection import SINKS


def chance_of_larger(first: Array, second: Array) -> float:
    """Probability that a random entry of ``first`` is larger than one of ``second``, ties counted half (AUC)."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, "left") + np.searchsorted(ordered, first, "right")
    return float(below.mean() / (2 * len(ordered)))


@dataclass(frozen=True)
class ApartResult:
    """Per prompt ``[n]``: the chance that Q2C ranks a random text token above a random visual one."""

    samples: Array


class Apart:
    """Compares Q2C's scores (last layer, question's rows) of text and visual tokens.

    Left out are the sinks and what stands behind the question, which Q2C keeps whatever they score.
    """

    def __init__(self) -> None:
        self._samples = Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt; without both modalities there is nothing to tell apart."""
        scores = seen.attention[-1].columns[QUESTION]
        asked = np.flatnonzero(seen.cache.layout.question)
        ranked = np.arange(len(scores))
        ranked = ranked[(ranked >= SINKS) & (ranked <= asked[-1])]
        visual = seen.cache.layout.visual[ranked]
        if visual.any() and not visual.all():
            self._samples.add(chance_of_larger(scores[ranked[~visual]], scores[ranked[visual]]))

    def result(self) -> ApartResult:
        """What was found so far."""
        return ApartResult(self._samples.rows)
