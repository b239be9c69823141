"""``oracle``: knows what each transfer will bring in time. The ceiling in a simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.situation import Indices, Situation


@dataclass(frozen=True)
class Oracle:
    """The point whose answer will be worth most, of those in time. It looks one question ahead, not further.

    Raises
    ------
    InputError
        Outside a simulation, where nobody knows.
    """

    def choose(self, now: Situation) -> Indices:
        """Index of a point per lane; where none will be in time, the one that asks least of the link."""
        if now.true_worth is None:
            raise InputError("the oracle knows only simulated links; choose greedy or risk-aware for a real one")
        return now.best(np.isfinite(now.true_worth) & now.allowed, now.true_worth)

    def budget(self, rate: Array, ratios: Array) -> Array:
        """The rate itself, which a simulator fills with the true one, ``[lanes]``."""
        return rate
