"""Average normalised Levenshtein similarity, for DocVQA and InfoVQA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvferry.evaluate.metrics.base import Metric


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters that make ``one`` into ``other`` (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


@dataclass(frozen=True)
class ANLS(Metric):
    """``1 - distance / longer length`` to the nearest reference, and 0 where that is below the threshold.

    Case and spacing do not matter. A. F. Biten et al., "Scene Text Visual Question Answering" (arXiv 1905.13648),
    eq. 1, which keeps a similarity only above 0.5; the DocVQA challenge's code keeps 0.5 itself too, and so do we.
    """

    threshold: float = 0.5
    name: ClassVar[str] = "ANLS"

    def score(self, said: str, references: Sequence[str]) -> float:
        """From 0 to 1."""
        best = max((_similarity(said, reference) for reference in references), default=0.0)
        return best if best >= self.threshold else 0.0


def _similarity(said: str, reference: str) -> float:
    one, other = (" ".join(text.lower().split()) for text in (said, reference))
    longest = max(len(one), len(other))
    return 1.0 - edit_distance(one, other) / longest if longest else 1.0
