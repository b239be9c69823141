"""Where attention goes: its mass by modality and its entropy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.running import Array, Reservoir, Running, mean_over
from kvferry.analyze.watch import QUESTION


@dataclass(frozen=True)
class MassResult:
    """Attention mass by modality of the key.

    Parameters
    ----------
    mean, margin : ``[layers, 3 row groups, 2 column modalities]``
        Share of a row's attention, averaged over the group's rows.
    entropy, entropy_margin : ``[layers, 3 row groups]``
        Over the logarithm of how many keys a row sees.
    even : ``[3 row groups]``
        Share of visual keys among those a row sees: the mass on the picture if attention were even.
    samples : ``[n, 2]``
        Per prompt with a picture: whether the question needs it (:attr:`Observation.needs`), and the question's mass
        on it, averaged over layers.
    """

    mean: Array
    margin: Array
    entropy: Array
    entropy_margin: Array
    even: Array
    samples: Array


class Mass:
    """Adds up mass and entropy."""

    def __init__(self) -> None:
        self._mass, self._entropy, self._even = Running(), Running(), Running()
        self._samples = Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt."""
        visual = seen.cache.layout.visual
        columns = np.stack([x.columns for x in seen.attention])
        rows = seen.attention[0].rows
        split = np.stack([columns[..., visual].sum(-1), columns[..., ~visual].sum(-1)], axis=-1)
        mass = np.where(rows[:, None] > 0, split / np.maximum(rows[:, None], 1), np.nan)
        if not visual.any():
            mass[..., 0] = np.nan
        self._mass.add(mass)
        self._entropy.add(np.stack([x.entropy for x in seen.attention]))
        visible = seen.attention[-1].visible
        self._even.add(np.where(visible.sum(-1) > 0, visible[:, 0] / np.maximum(visible.sum(-1), 1), np.nan))
        if visual.any():
            self._samples.add([seen.needs, float(mean_over(mass[:, QUESTION, 0], axis=0))])

    def result(self) -> MassResult:
        """What was found so far."""
        mass, entropy = self._mass, self._entropy
        return MassResult(mass.mean, mass.margin, entropy.mean, entropy.margin, self._even.mean, self._samples.rows)
