"""Text at one fixed share, the picture at what the budget leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.selection.modality.base import Policy, Quota


@dataclass(frozen=True)
class VisualHeavy(Policy):
    """The share ``text`` of the text tokens stays, and the pruning falls on the picture.

    The sources' modality-aware selection with separate fractions for text and visual tokens (research note "topic
    13"); the visual fraction follows from the budget, so that policies are compared at equal size. Where the budget
    holds more than all visual tokens, text takes the rest.

    Parameters
    ----------
    text : float
        In [0, 1].
    """

    text: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 <= self.text <= 1.0:
            raise InputError(f"modality=visual_heavy:{self.text:g}: the share of text that stays lies in [0, 1]")

    def quota(self, keep: int, text: int, visual: int) -> Quota:
        """The share of text, exact to a token, then visual tokens only."""
        wanted = math.floor(self.text * text + 0.5)
        return Quota(text=max(wanted, keep - visual), visual_first=True)
