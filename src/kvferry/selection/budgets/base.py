"""What a budget is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest


class Budget(ABC):
    """How many tokens each layer keeps; the total is that of the fraction, exact to a token."""

    ranks_jointly: ClassVar[bool] = False
    """Whether all layers and heads keep the same tokens, by the sum of their scores."""

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill must observe for this budget."""
        return ()

    @abstractmethod
    def counts(self, cache: KVCache, evidence: Evidence, fraction: float, least: int) -> list[int]:
        """Tokens per layer, none below ``least``; :class:`BudgetError` where the fraction does not allow that."""

    def least_per_head(self, keep: int) -> int | None:
        """Where the heads of a layer that keeps ``keep`` share its budget out among them: how many each is owed."""
        return None
