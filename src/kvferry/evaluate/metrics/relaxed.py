"""Relaxed accuracy, for ChartQA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric


@dataclass(frozen=True)
class RelaxedAccuracy(Metric):
    """1 for a number within 5 % of the reference, and for the same text but for case.

    A. Masry et al., "ChartQA" (arXiv 2203.10244), section 5.1. A number is what Python's ``float`` reads; one with a
    percent sign counts as its hundredth. Against a reference of zero only the same text is right.
    """

    tolerance: float = 0.05
    name: ClassVar[str] = "relaxed accuracy"

    def score(self, said: str, references: Sequence[str]) -> float:
        """0 or 1."""
        return float(any(self._right(said.strip(), reference.strip()) for reference in references))

    def _right(self, said: str, reference: str) -> bool:
        given, wanted = _number(said), _number(reference)
        if given is not None and wanted:
            return abs(given - wanted) <= self.tolerance * abs(wanted)
        return said.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
