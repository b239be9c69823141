"""No difference between modalities."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.selection.modality.base import Policy, Quota


@dataclass(frozen=True)
class Uniform(Policy):
    """All tokens compete, whatever they stand for."""

    def quota(self, keep: int, text: int, visual: int) -> Quota:
        """Nothing is promised."""
        return Quota()
