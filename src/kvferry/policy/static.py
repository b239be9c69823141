"""``static``: always the same mode, whatever the link does. What an adaptive policy is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.situation import Indices, Situation


@dataclass(frozen=True)
class Static:
    """One mode, sent even where it will be late.

    Raises
    ------
    InputError
        When asked to choose where the mode has no point, or is not allowed.
    """

    mode: str

    def choose(self, now: Situation) -> Indices:
        """Index of the mode's point per lane."""
        mine = (now.modes == self.mode) & now.allowed
        if not mine.any(axis=1).all():
            known = ", ".join(np.unique(now.modes[now.allowed]))
            raise InputError(f"there is no allowed point for the mode {self.mode!r} everywhere; there are {known}")
        return np.broadcast_to(mine.argmax(axis=1), now.rate.shape).astype(np.int64)

    def budget(self, rate: Array, ratios: Array) -> Array:
        """The whole forecast, ``[lanes]``."""
        return rate
