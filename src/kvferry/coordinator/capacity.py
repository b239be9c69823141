"""How much an uplink carries: what the agents' acknowledged bytes add up to, below a configured bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvferry.link import Rate, read_trace
from kvferry.link.estimate import LEAST
from kvferry.link.shaper import TRACE

SHORT = 0.9
"""Of the measured rate: a little less is handed out, so that what queues in the link can drain."""
FALL = 0.5
"""The estimate falls by no more than this factor at once: so little may have been asked of the link."""
RISE = 1.05
"""Factor each time that nothing was slow."""

Bound = Callable[[float], float]
"""Bits per second at a time in seconds."""


def bound_of(text: str) -> Bound:
    """What ``10mbit`` or ``trace:NAME`` allows; a trace begins at time 0 and counts by the second to come.

    Raises
    ------
    InputError
        It is neither a rate nor a trace.
    """
    if not text.startswith(TRACE):
        rate = Rate.parse(text).bits_per_second
        return lambda now: rate
    trace = read_trace(text.removeprefix(TRACE))
    return lambda now: max(8 * float(trace.offered(now + 1) - trace.offered(now)), LEAST)


@dataclass
class Capacity:
    """An estimate that starts at the bound, falls to what is measured, and rises again.

    While transfers take longer than their shares promise, the link is full, and what all agents together get through is
    its capacity. Otherwise that sum only says what was asked of it, so the estimate rises slowly towards the bound.

    Parameters
    ----------
    bound : callable
        See :func:`bound_of`.
    """

    bound: Bound
    _measured: float = field(default=float("inf"), init=False)

    def at(self, now: float) -> float:
        """Bits per second that can be shared out."""
        return max(min(self.bound(now), self._measured), LEAST)

    def hear(self, now: float, rate: float, slow: bool) -> None:
        """What all agents got through lately, in bits per second, and whether any of them was slow."""
        before = self.at(now)
        self._measured = min(before, max(SHORT * rate, FALL * before)) if slow else RISE * before
