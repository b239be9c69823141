"""All text stays."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.selection.modality.base import Policy, Quota


@dataclass(frozen=True)
class TextPreserving(Policy):
    """Every text token stays; the rest of the budget goes to the highest-ranked visual tokens.

    The sources' answer to text being the denser modality (research note "topic 13").
    """

    def quota(self, keep: int, text: int, visual: int) -> Quota:
        """All of the text."""
        return Quota(text=text)
