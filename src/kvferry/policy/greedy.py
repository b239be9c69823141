"""``greedy``: the best point that fits, as if a cautious share of the forecast were certain."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.situation import Indices, Situation


@dataclass(frozen=True)
class Greedy:
    """``argmax quality(m)`` subject to ``T(m) <= deadline`` at ``safety`` times the forecast (Cheng and Liao 2026).

    Where nothing is known of the link, or nothing fits, the point that asks least of it.
    """

    safety: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 10:
            raise InputError(f"a safety factor is above 0, such as 0.8, not {self.safety}")

    def choose(self, now: Situation) -> Indices:
        """Index of a point per lane, -1 where none can be in time."""
        return now.best(now.fits(self.safety * now.rate), now.quality)

    def budget(self, rate: Array, ratios: Array) -> Array:
        """Bits per second that may be shared out, ``[lanes]``, NaN where nothing is known."""
        return self.safety * rate
