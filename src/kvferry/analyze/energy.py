"""How much of a layer's energy its few largest singular values hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.analyze.observe import Observation
from kvferry.analyze.rank import token_vectors
from kvferry.analyze.running import Array, Reservoir, Running, mean_over
from kvferry.lazy import torch

TOP = 0.05
"""Share of the singular values."""


def top_energy(matrices: torch.Tensor, share: float = TOP) -> Array:
    """Share of all squared singular values of ``[..., m, d]`` that the largest ``share`` of them hold, ``[...]``.

    Where ``share`` of them is no whole number, the next one counts by its part. No mean is subtracted.
    """
    squares = torch.linalg.svdvals(matrices.double()).square()
    taken = (share * squares.shape[-1] - torch.arange(squares.shape[-1])).clamp(0, 1)
    total = squares.sum(-1).clamp_min(torch.finfo(squares.dtype).tiny)
    result: Array = ((squares * taken).sum(-1) / total).numpy()
    return result


@dataclass(frozen=True)
class EnergyResult:
    """What :func:`top_energy` found in whole layers: all tokens of a prompt, the heads side by side.

    Parameters
    ----------
    mean, margin : ``[layers, 3 kinds]``
        Averaged over prompts, and half the width of a 95 % interval; kinds as in ``rank``.
    samples : ``[n, 3 kinds]``
        Per prompt, averaged over layers.
    """

    mean: Array
    margin: Array
    samples: Array


class Energy:
    """Adds up shares of energy, one prompt after the other."""

    def __init__(self) -> None:
        self._shares = Running()
        self._samples = Reservoir()

    def add(self, seen: Observation) -> None:
        """One prompt."""
        vectors = token_vectors(seen)
        known = ~vectors.isnan().flatten(2).any(-1).numpy()
        shares = np.where(known, top_energy(vectors.nan_to_num()), np.nan)
        self._shares.add(shares)
        self._samples.add(mean_over(shares, axis=0))

    def result(self) -> EnergyResult:
        """What was found so far."""
        return EnergyResult(self._shares.mean, self._shares.margin, self._samples.rows)
