"""What a call tells about the link: how fast the cloud acknowledged bytes while others waited behind them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise

LEAST_BYTES = 4096
"""Fewer acknowledged bytes say more about clocks and round trips than about a rate."""


class Transfer:
    """Bytes of one call, as they are handed over and as they are acknowledged.

    Parameters
    ----------
    clock : callable
        Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._handed: list[tuple[float, int]] = []
        self._acknowledged: list[tuple[float, int]] = []
        self._was_cut = False

    def hand_over(self, total: int) -> None:
        """So many bytes have been handed over by now."""
        self._handed.append((self._clock(), total))

    def acknowledge(self, total: int) -> None:
        """So many bytes are known to have arrived."""
        self._acknowledged.append((self._clock(), total))

    def cut(self) -> None:
        """Nobody waits any more; what was handed over and not acknowledged was too slow."""
        arrived = self._acknowledged[-1][1] if self._acknowledged else 0
        if self._handed and arrived < self._handed[-1][1]:
            self.acknowledge(arrived)
            self._was_cut = True

    def measured(self, rtt_seconds: float) -> tuple[int, float] | None:
        """Acknowledged bytes and the seconds that they took, or None where that says nothing.

        Only the stretches count between two acknowledgements at whose beginning all that the second one acknowledges
        had been handed over: elsewhere the sender, not the link, may have been what was slow. The first stretch begins
        one round trip after the first byte.
        """
        if not self._handed:
            return None
        first = self._handed[0][0]
        marks = [(first, first + rtt_seconds, 0), *((t, t, b) for t, b in self._acknowledged)]
        nbytes, seconds = 0, 0.0
        for (began, counts_from, before), (_, ended, after) in pairwise(marks):
            if self._handed_over_by(began) >= after:
                nbytes += after - before
                seconds += max(ended - counts_from, 0.0)
        return (nbytes, seconds) if seconds and (nbytes >= LEAST_BYTES or self._was_cut) else None

    def _handed_over_by(self, moment: float) -> int:
        index = bisect_right(self._handed, moment, key=lambda each: each[0])
        return self._handed[index - 1][1] if index else 0
