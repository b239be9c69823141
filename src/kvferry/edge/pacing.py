"""Sending no faster than a share allows, and noticing where the link does not keep up with it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from kvferry.link import Rate
from kvferry.link.estimate import LEAST
from kvferry.modes.base import CHUNK_BYTES
from kvferry.modes.checks import cut

PIECE_SECONDS = 0.1
PIECE_BYTES = 1500
"""Pieces are as small as that, or as what the share carries in :data:`PIECE_SECONDS`."""
ON_TIME = 1e-9
"""Seconds that a clock may not tell apart."""
ACKNOWLEDGED_BYTES = 4096
"""After so many bytes, and at the end, a cloud acknowledges what has arrived."""
SLACK_SECONDS = 0.25
SLACK_PART = 1.1
"""An acknowledgement is late where it takes a tenth and a quarter of a second more than the share and a round trip."""

Clock = Callable[[], float]


class Meter:
    """What one edge's transfers did between two reports. Any thread may call it.

    Parameters
    ----------
    clock : callable
        Seconds that only go forward.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._due: deque[tuple[float, int]] = deque()
        self._acknowledged = 0
        self._busy_since: float | None = None
        self._bytes, self._seconds, self._slow = 0, 0.0, False

    def begin(self) -> None:
        """A transfer starts."""
        with self._lock:
            self._acknowledged, self._busy_since = 0, self._clock()
            self._due.clear()

    def expect(self, total: int, by: float) -> None:
        """So many bytes of the transfer should be acknowledged by then; of one that is over, nothing is expected."""
        with self._lock:
            if self._busy_since is not None:
                self._due.append((by, total))

    def acknowledge(self, total: int) -> None:
        """So many of its bytes have been."""
        with self._lock:
            self._look()
            self._bytes += max(total - self._acknowledged, 0)
            self._acknowledged = total
            while self._due and self._due[0][1] <= total:
                self._due.popleft()

    def end(self) -> None:
        """It is over, whole or cut."""
        with self._lock:
            self._look()
            self._busy_since = None
            self._due.clear()

    def take(self) -> tuple[int, float, bool]:
        """Bytes acknowledged since the last call, seconds with some under way, and whether any were late."""
        with self._lock:
            self._look()
            taken = self._bytes, self._seconds, self._slow
            self._bytes, self._seconds, self._slow = 0, 0.0, False
            return taken

    def _look(self) -> None:
        now = self._clock()
        if self._busy_since is not None:
            self._seconds += now - self._busy_since
            self._busy_since = now
        self._slow |= bool(self._due) and self._due[0][0] < now


class Pacer:
    """A serial line at the rate of a share that may change, or lapse, while bytes leave.

    What has not left yet leaves at the rate of now: a share that rises is felt at once.

    Parameters
    ----------
    rate : callable
        Bits per second at the moment; None where there is no share to keep. 0 keeps what was granted before.
    meter : Meter
    clock, sleep : callable
    """

    def __init__(
        self,
        rate: Callable[[], float | None],
        meter: Meter,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.meter = meter
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._granted: Rate | None = None
        self._line_bytes = 0.0
        self._looked_at = 0.0

    def paced(self, chunks: Iterator[bytes], rtt_seconds: float) -> Iterator[bytes]:
        """The same bytes in smaller pieces, each when it may leave.

        By when each should be acknowledged follows from the share and from the time that making the bytes took, not
        from when they were asked for: a full link asks late.
        """
        self.meter.begin()
        total = expected = 0
        first = start = end = 0.0
        due: float | None = None
        asked = self._clock()
        for chunk in chunks:
            start = max(end, start + self._clock() - asked)
            for piece in self._cut(chunk):
                total += len(piece)
                if (rate := self._wait()) is None:
                    due = None
                else:
                    self._line_bytes += len(piece)
                    if not first:
                        first = start = self._clock()
                    end = start + rate.seconds(len(piece))
                    due = first + SLACK_PART * (end - first) + rtt_seconds + SLACK_SECONDS
                    if total - expected >= ACKNOWLEDGED_BYTES:
                        self.meter.expect(total, due)
                        expected = total
                yield piece
                start = max(start, end)
            asked = self._clock()
        if due is not None and expected < total:
            self.meter.expect(total, due)

    def _current(self) -> Rate | None:
        bits = self._rate()
        if bits is None:
            self._granted, self._line_bytes = None, 0.0
        elif bits > 0 or self._granted is None:
            self._granted = Rate(max(bits, LEAST))
        return self._granted

    def _cut(self, chunk: bytes) -> Iterator[bytes]:
        rate = self._current()
        limit = CHUNK_BYTES if rate is None else int(rate.bits_per_second / 8 * PIECE_SECONDS)
        return cut([chunk], min(max(limit, PIECE_BYTES), CHUNK_BYTES))

    def _wait(self) -> Rate | None:
        """Until the bytes before these have left; the rate at which these leave, None without a share."""
        while (rate := self._current()) is not None:
            now = self._clock()
            self._line_bytes = max(self._line_bytes - (now - self._looked_at) * rate.bits_per_second / 8, 0.0)
            self._looked_at = now
            if (left := rate.seconds(1) * self._line_bytes) < ON_TIME:
                return rate
            self._sleep(min(left, PIECE_SECONDS))
        return None
