"""One ranking for all, with a floor under each modality."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.selection.modality.base import Policy, Quota


@dataclass(frozen=True)
class Adaptive(Policy):
    """Text and visual tokens compete by score, but neither falls below the share ``floor`` of the budget.

    Parameters
    ----------
    floor : float
        Of the tokens kept, for each modality, in [0, 0.5]; rounded down. A modality with fewer tokens keeps them all.
    """

    floor: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 0.5:
            raise InputError(f"modality=adaptive:{self.floor:g}: each modality can be owed 0 to 0.5 of the budget")

    def quota(self, keep: int, text: int, visual: int) -> Quota:
        """The floor for each, then joint ranking."""
        owed = math.floor(self.floor * keep)
        return Quota(text=min(owed, text), visual=min(owed, visual))
