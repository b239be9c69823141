"""``oracle``: knows how long each transfer will take. The ceiling in a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.situation import Indices, Situation


@dataclass(frozen=True)
class Oracle:
    """The best point that will be in time. It looks one question ahead, not further.

    Raises
    ------
    InputError
        Outside a simulation, where nobody knows.
    """

    def choose(self, now: Situation) -> Indices:
        """Index of a point per lane; where none will be in time, the one that asks least of the link."""
        if now.true_seconds is None:
            raise InputError("the oracle knows only simulated links; choose greedy or risk-aware for a real one")
        return now.best((now.true_seconds <= now.deadline) & now.allowed, now.quality)

    def budget(self, rate: Array, ratios: Array) -> Array:
        """The rate itself, which a simulator fills with the true one, ``[lanes]``."""
        return rate
