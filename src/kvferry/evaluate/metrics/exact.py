"""Exact match, as the testbed counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric
from kvferry.testbed import exact_match


@dataclass(frozen=True)
class ExactMatch(Metric):
    """1 where an answer is one of the references but for case and spacing."""

    name: ClassVar[str] = "accuracy"

    def score(self, said: str, references: Sequence[str]) -> float:
        """0 or 1."""
        return float(any(exact_match(said, reference) for reference in references))
