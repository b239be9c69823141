"""PyramidKV: wide at the bottom, narrow at the top."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.errors import InputError
from kvferry.evidence import Evidence
from kvferry.selection.budgets.base import Budget
from kvferry.selection.budgets.shares import share_out


@dataclass(frozen=True)
class Pyramid(Budget):
    """Linear in the layer: the last keeps ``1 / beta`` of the mean, the first ``2 - 1 / beta`` of it.

    Based on PyramidKV (arXiv 2406.02069), section on budget allocation. Where that would give the first layers more
    tokens than there are, the others share the rest.

    Parameters
    ----------
    beta : float
        How steep; 1 is flat. 20 is what the authors' code uses.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.beta < float("inf"):
            raise InputError(f"budget=pyramid:{self.beta:g}: beta is a finite number of at least 1, for instance 20")

    def counts(self, cache: KVCache, evidence: Evidence, fraction: float, least: int) -> list[int]:
        """Falling from layer to layer."""
        layers, top = len(cache.layers), 1 / self.beta
        weights = [2 - top - (2 - 2 * top) * i / max(layers - 1, 1) for i in range(layers)]
        return share_out(weights, fraction, cache.length, least)
