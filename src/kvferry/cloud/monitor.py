"""What a cloud notes of every request: numbers and names for its log, its metrics and its traces, and nothing of what
was asked, shown or answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvferry.errors import DeadlineError
from kvferry.modes import mode_name
from kvferry.telemetry import printable_id
from kvferry.telemetry.logs import ACCESS
from kvferry.telemetry.traces import Span, Value, span
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import kind_of

LEAST_BYTES = 4096
"""Fewer bytes behind the first chunk say nothing about a rate."""
SLACK_SECONDS = 0.1
"""The edge's clock ends a call a moment before the cloud's does."""
OK, CANCELLED, DENIED = "ok", "cancelled", "denied"
access = logging.getLogger(ACCESS)


@dataclass
class Record:
    """One request, filled in while it runs.

    Attributes
    ----------
    request_id : str
        As the edge chose it, where that is printable.
    mode : str
        Empty before a start that names one.
    replica : str
        Of a gateway: which of its replicas was asked last.
    outcome : str
        ``ok``, ``cancelled``, ``denied`` (to this caller), or the kind of the error (``deadline``, ``corrupt``, ...:
        ``ErrorKind`` of the protocol).
    expected_bits_per_second, achieved_bits_per_second : float
        What the edge's forecast said of its uplink, and how fast the chunks arrived; 0 where that is not known.
    bf16_bytes : int
        The unpruned cache in BF16, where a whole cache was sent.
    """

    request_id: str = "unnamed"
    mode: str = ""
    replica: str = ""
    outcome: str = OK
    received_bytes: int = 0
    bf16_bytes: int = 0
    tokens: int = 0
    share: float = 1.0
    expected_bits_per_second: float = 0.0
    decode_seconds: float = 0.0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    deadline_missed: bool = False
    answered: bool = False
    _first: tuple[float, int] = (0.0, 0)
    _last: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    @property
    def achieved_bits_per_second(self) -> float:
        """Of what came behind the first chunk, by the clock between its arrival and the last one's."""
        seconds, nbytes = self._last - self._first[0], self.received_bytes - self._first[1]
        return 8 * nbytes / seconds if nbytes >= LEAST_BYTES and seconds > 0 else 0.0

    @property
    def ratio(self) -> float:
        """How much smaller than BF16 a cache came; 0 where none came whole."""
        return self.bf16_bytes / self.received_bytes if self.received_bytes and self.share == 1 else 0.0

    def started(self, start: pb.AskRequest.Start) -> None:
        """The request has said what it is, and the mode is one that this cloud knows."""
        self.request_id = printable_id(start.request_id)
        self.mode = mode_name(start.mode) if start.mode in pb.Mode.values() else f"plugin-{start.mode}"
        self.expected_bits_per_second = max(start.expected_bits_per_second, 0.0)

    def arrived(self, nbytes: int) -> None:
        """A chunk."""
        self.received_bytes += nbytes
        self._last = time.perf_counter()
        if not self._first[0]:
            self._first = (self._last, nbytes)

    def done(self, done: pb.AskReply.Done, bf16_bytes: int) -> None:
        """The answer is complete."""
        self.answered = True
        self.tokens, self.share, self.bf16_bytes = done.tokens, done.share, bf16_bytes
        self.decode_seconds, self.queue_seconds = done.timings.decode, done.timings.queue
        self.prefill_seconds, self.first_token_seconds = done.timings.prefill, done.timings.first_token

    def failed(self, error: BaseException) -> None:
        """It ended with an error that the edge is told."""
        self.outcome = kind_of(error) if self.outcome == OK else self.outcome
        self.deadline_missed = isinstance(error, DeadlineError)

    def ended(self, outcome: str | None = None) -> None:
        """Nothing more happens."""
        self.total_seconds = time.perf_counter() - self._began
        self.outcome = outcome or self.outcome

    def as_dict(self) -> dict[str, Value]:
        """For a log line: names and rounded numbers."""
        numbers: dict[str, Value] = {
            "bytes": self.received_bytes,
            "tokens": self.tokens,
            "ratio": round(self.ratio, 2),
            "share": round(self.share, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "queue_seconds": round(self.queue_seconds, 4),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "first_token_seconds": round(self.first_token_seconds, 4),
            "total_seconds": round(self.total_seconds, 4),
        }
        line: dict[str, Value] = {"request_id": self.request_id, "mode": self.mode or "none", "outcome": self.outcome}
        return line | ({"replica": self.replica} if self.replica else {}) | numbers


class Observer(Protocol):
    """Is told of requests, such as :class:`kvferry.cloud.metrics.Metrics`."""

    def began(self) -> None:
        """A request was opened."""

    def ended(self, record: Record) -> None:
        """It has ended, whatever way."""


class Monitor:
    """Writes one access line for every request, and tells ``observers`` of it."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    @contextmanager
    def request(
        self, seconds_left: Callable[[], float | None], metadata: Iterable[tuple[str, Any]] | None = None
    ) -> Iterator[Record]:
        """The record of a request, for as long as it runs, with a span around it.

        Parameters
        ----------
        seconds_left : callable
            Until the edge's own deadline; None where it has none. A call that is cancelled when none are left was
            late.
        metadata : pairs, optional
            The call's, in which an edge's span may be named.
        """
        with span("request", "server", metadata or ()) as around:
            yield from self._followed(seconds_left, around)

    def _followed(self, seconds_left: Callable[[], float | None], around: Span) -> Iterator[Record]:
        record = Record()
        for observer in self._observers:
            observer.began()
        try:
            yield record
            record.ended()
        except asyncio.CancelledError:
            left = seconds_left()
            record.deadline_missed = left is not None and left <= SLACK_SECONDS
            record.ended("deadline" if record.deadline_missed else CANCELLED)
            raise
        except BaseException as error:
            record.failed(error)
            record.ended()
            raise
        finally:
            for observer in self._observers:
                observer.ended(record)
            line = record.as_dict()
            around.note(line)
            if record.outcome != OK:
                around.failed(record.outcome)
            access.info("request", extra=line)
