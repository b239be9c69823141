"""When may bytes leave? The one question a link model answers; nothing here waits or touches a socket."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvferry.link.rate import Rate
from kvferry.link.trace import PACKET_BYTES, Trace, mean_rate, read_trace

TRACE = "trace:"


class Shaper(Protocol):
    """A first-in first-out link. Times are seconds on any monotonic clock."""

    @property
    def piece_bytes(self) -> int:
        """How many bytes are best scheduled at once: small beside a millisecond's worth, at least a packet."""

    def departure(self, nbytes: int, arrived: float) -> float:
        """When the last of ``nbytes`` that arrived at ``arrived`` has left. Calls are in order of arrival."""


@dataclass
class TokenBucket:
    """A constant rate: tokens drip in at ``rate``, at most ``burst`` bytes of them are kept while the link is idle.

    With ``burst=0`` (a serial line) every byte takes its full time on the wire.
    The schedule depends on the arrivals alone, never on how late the caller asks, so the rate does not drift.
    """

    rate: Rate
    burst: int = 0
    _free: float = field(default=float("-inf"), init=False, repr=False)

    @property
    def piece_bytes(self) -> int:
        return max(PACKET_BYTES, int(self.rate.bits_per_second / 8 / 1000))

    def departure(self, nbytes: int, arrived: float) -> float:
        self._free = max(self._free, arrived - self.rate.seconds(self.burst)) + self.rate.seconds(nbytes)
        return max(self._free, arrived)


@dataclass
class Unlimited:
    """A link that never holds anything up."""

    piece_bytes: int = 64 * 1024

    def departure(self, nbytes: int, arrived: float) -> float:
        return arrived


@dataclass
class Replay:
    """A trace, whose time 0 is when the first byte arrives. What it offers while nothing waits is lost."""

    trace: Trace
    _origin: float | None = field(default=None, init=False, repr=False)
    _used: float = field(default=0.0, init=False, repr=False)

    @property
    def piece_bytes(self) -> int:
        return max(PACKET_BYTES, int(mean_rate(self.trace) / 8 / 1000))

    def departure(self, nbytes: int, arrived: float) -> float:
        if self._origin is None:
            self._origin = arrived
        self._used = max(self._used, float(self.trace.offered(arrived - self._origin))) + nbytes
        return max(self._origin + float(self.trace.time_of(self._used)), arrived)


def shaper_for(rate: Rate | str | None) -> Shaper:
    """A shaper for a rate, a rate's text, ``trace:NAME`` (see :func:`kvferry.link.read_trace`), or no limit."""
    if rate is None:
        return Unlimited()
    if isinstance(rate, str) and rate.startswith(TRACE):
        return Replay(read_trace(rate.removeprefix(TRACE)))
    return TokenBucket(Rate.parse(rate) if isinstance(rate, str) else rate)
