"""The same count in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence
from kvferry.selection.budgets.base import Budget
from kvferry.selection.budgets.shares import check_room
from kvferry.selection.eviction import kept_count


@dataclass(frozen=True)
class Uniform(Budget):
    """Every layer keeps the fraction's nearest whole number of tokens."""

    def counts(self, cache: KVCache, evidence: Evidence, fraction: float, least: int) -> list[int]:
        """The same for each layer."""
        keep = kept_count(fraction, cache.length)
        check_room(keep, cache.length, least)
        return [keep] * len(cache.layers)
